# SPDX-License-Identifier: Apache-2.0
"""Precision of Ascend NPUs: HF32, off for products and ON for convolutions by default."""

from __future__ import annotations

import os
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
        switches: list[tuple[Switch, object]] = [
            (attribute_switch(npu.matmul, "allow_hf32", "torch.npu.matmul.allow_hf32"), allowed),
            (attribute_switch(npu.conv, "allow_hf32", "torch.npu.conv.allow_hf32"), allowed),
        ]
        if getattr(npu.matmul, "cube_math_type", None) is not None:
            # A second switch of newer versions, which can ask for float16 even. It reads as None until somebody sets
            # it, and cannot be set back to that: it is touched only where it is in use.
            kind = npu.CubeMathType.USE_HF32 if allowed else npu.CubeMathType.KEEP_DTYPE
            switches.append((attribute_switch(npu.matmul, "cube_math_type", "torch.npu.matmul.cube_math_type"), kind))
        return switches

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        # Reductions across devices have a switch of their own (HCCL documentation, A2 and later); "strict" is more. Not
        # `torch.npu.set_deterministic_level`: it rewrites torch's own switch, and says not to use both.
        given = os.environ.get("HCCL_DETERMINISTIC", "")
        return [(environment_switch("HCCL_DETERMINISTIC"), given if given.lower() in ("true", "strict") else "true")]
