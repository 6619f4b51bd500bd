# SPDX-License-Identifier: Apache-2.0
"""Precision of AMD GPUs: XF32 on MI300, behind torch's TF32 switches and an environment variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from hal.changes import Switch, environment_switch
from hal.precision import Fp32Mode
from hal_cuda.precision import CudaPrecision


@final
class RocmPrecision(CudaPrecision):
    """torch's switches for CUDA serve here, too; older versions of torch also want hipBLASLt to be told.

    MI300's XF32 rounds its sums down, so "tf32" is not NVIDIA's TF32 (pytorch PR#172465); the measurement of input bits
    is the same.
    """

    override: ClassVar[tuple[str, ...]] = ("NVIDIA_TF32_OVERRIDE", "MIOPEN_TF32_OVERRIDE")

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        # pytorch PR#139869: without it the switch did nothing on MI300.
        tf32 = (environment_switch("HIPBLASLT_ALLOW_TF32"), "1" if mode == "tf32" else "0")
        return [*super()._fp32_switches(mode), tf32]

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        return ()
