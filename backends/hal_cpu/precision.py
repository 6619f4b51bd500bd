# SPDX-License-Identifier: Apache-2.0
"""Precision of the CPU: oneDNN's float32 modes, set one operation at a time and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from hal.changes import Switch
from hal.errors import UnsupportedPrecision
from hal.fp32_switch import fp32_switch, has_fp32_switches
from hal.precision import Fp32Mode, Precision

if TYPE_CHECKING:
    import torch


def emulated(operator: str, dtype: torch.dtype) -> str | None:
    """Return how torch does an operator on this processor that no library has (aten/src/ATen/native/Blas.cpp)."""
    import torch

    if operator == "grouped_mm":
        return "torch multiplies group by group (_grouped_mm_fallback)"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # then oneDNN multiplies FP8
    if operator == "scaled_mm" and not (amx and torch.backends.mkldnn.is_available()):
        return "torch widens FP8 to float32 and multiplies that (_scaled_mm_out_cpu_emulated)"
    return None


@final
class CpuPrecision(Precision):
    """oneDNN may compute float32 products in bfloat16 passes where the processor has the unit for it."""

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        import torch

        if not has_fp32_switches():
            if mode == "ieee":  # before torch 2.9 there was no switch, and nothing but IEEE
                return ()
            raise UnsupportedPrecision(
                f"torch {torch.__version__} has no float32 modes on a CPU", device=self.device_id, what=mode,
                expected="torch 2.9 or later",
            )  # fmt: skip
        if mode == "bf16x3":
            raise UnsupportedPrecision(
                f"torch {torch.__version__} offers the CPU no three-pass bfloat16 mode",
                device=self.device_id,
                what=mode,
            )
        # One operation at a time: torch's setter for the library writes the switch of everything. On most processors
        # the mode "tf32" exists as a value only; the measurement decides whether it does anything.
        return [
            (fp32_switch("mkldnn", part, f"torch.backends.mkldnn.{part}.fp32_precision"), mode)
            for part in ("matmul", "conv", "rnn")
        ]
