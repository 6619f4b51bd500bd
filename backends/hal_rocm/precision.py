# SPDX-License-Identifier: Apache-2.0
"""Precision of AMD GPUs: XF32 on MI300, behind torch's TF32 switches and an environment variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from hal.changes import Switch, environment_switch
from hal.errors import UnsupportedPrecision
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
        if mode == "tf32":
            self._refuse_without_unit()
        # pytorch PR#139869: without it the switch did nothing on MI300.
        tf32 = (environment_switch("HIPBLASLT_ALLOW_TF32"), "1" if mode == "tf32" else "0")
        return [*super()._fp32_switches(mode), tf32]

    def _refuse_without_unit(self) -> None:
        import torch

        properties = getattr(torch.get_device_module(self.torch_device), "get_device_properties", None)
        arch = "" if properties is None else str(getattr(properties(self.torch_device), "gcnArchName", ""))
        # gfx950 has no XF32; its library emulates TF32 with bfloat16 passes, and the measurement decides.
        if arch and not arch.startswith("gfx94") and not arch.startswith("gfx95"):
            raise UnsupportedPrecision(
                f"{arch.partition(':')[0]} has no reduced float32 unit; XF32 came with gfx942",
                device=self.device_id, what="tf32",
            )  # fmt: skip

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        # torch keeps rocBLAS from atomics by itself; the workspace variable is cuBLAS's.
        return [s for s in super()._deterministic_switches() if s[0].name.startswith("torch.")]
