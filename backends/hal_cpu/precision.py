# SPDX-License-Identifier: Apache-2.0
"""Precision of the CPU: oneDNN's float32 modes, set one operation at a time and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from hal.changes import Switch
from hal.errors import UnsupportedPrecision
from hal.precision import Fp32Mode, Precision, attribute_switch


@final
class CpuPrecision(Precision):
    """oneDNN may compute float32 products in bfloat16 passes where the processor has the unit for it."""

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        import torch

        mkldnn = torch.backends.mkldnn
        if not hasattr(getattr(mkldnn, "matmul", None), "fp32_precision"):
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
        # Never `torch.backends.mkldnn.fp32_precision`: its setter writes the generic switch and thereby resets
        # cuDNN's (torch/backends/mkldnn/__init__.py, in 2.13 to 2.15). The mode "tf32" exists as a value only;
        # the measurement decides whether it does anything.
        return [
            (
                attribute_switch(
                    getattr(mkldnn, part), "fp32_precision", f"torch.backends.mkldnn.{part}.fp32_precision"
                ),
                mode,
            )
            for part in ("matmul", "conv", "rnn")
        ]
