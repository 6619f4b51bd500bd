# SPDX-License-Identifier: Apache-2.0
"""Precision of Ascend NPUs: HF32, off for products and ON for convolutions by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from hal.changes import Switch, environment_switch
from hal.errors import UnsupportedPrecision
from hal.precision import Fp32Mode, Precision, attribute_switch


@final
class AscendPrecision(Precision):
    """torch's own `fp32_precision` is a silent no-op here: torch_npu never reads it (its source has no reference).

    Source: torch_npu/npu/npu_config.py. `aclnn.allow_hf32` is a second name of the convolutions' switch.
    """

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        import torch

        if mode == "bf16x3":
            raise UnsupportedPrecision("torch_npu has no three-pass mode", device=self.device_id, what=mode)
        npu = torch.get_device_module(self.torch_device)
        allowed = mode == "tf32"
        return [
            (attribute_switch(npu.matmul, "allow_hf32", "torch.npu.matmul.allow_hf32"), allowed),
            (attribute_switch(npu.conv, "allow_hf32", "torch.npu.conv.allow_hf32"), allowed),
        ]

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        # Reductions across devices have a switch of their own (HCCL documentation, A2 and later).
        return [(environment_switch("HCCL_DETERMINISTIC"), "true")]
