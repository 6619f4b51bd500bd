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
    is the same. gfx950 has no such unit. Behind the same switches its library multiplies in passes of bfloat16
    (hipBLASLt PR#1806), which is the mode "bf16x3" if they are three, and if its convolutions do the same (MIOpen had
    that off: rocm-libraries PR#4017). The measurement tells, in both modes.
    """

    override: ClassVar[tuple[str, ...]] = ("NVIDIA_TF32_OVERRIDE", "MIOPEN_TF32_OVERRIDE")
    workspace: ClassVar[bool] = False  # torch keeps rocBLAS from atomics by itself

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        arch = self._arch()
        if mode == "tf32" and arch and not arch.startswith(("gfx94", "gfx95")):
            raise UnsupportedPrecision(
                f"{arch} has no reduced float32 unit; XF32 came with gfx942", device=self.device_id, what=mode
            )
        by_passes = mode == "bf16x3" and arch.startswith("gfx95")
        # pytorch PR#139869: without it the switch did nothing on MI300.
        allowed = (environment_switch("HIPBLASLT_ALLOW_TF32"), "0" if mode == "ieee" else "1")
        return [*super()._fp32_switches("tf32" if by_passes else mode), allowed]

    def _arch(self) -> str:
        """Return the architecture without its features, such as "gfx942"; empty where the device does not tell."""
        import torch

        properties = getattr(torch.get_device_module(self.torch_device), "get_device_properties", None)
        name = "" if properties is None else str(getattr(properties(self.torch_device), "gcnArchName", ""))
        return name.partition(":")[0]
