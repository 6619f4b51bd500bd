# SPDX-License-Identifier: Apache-2.0
"""The implementation that is always there: everything that `hal.moe` has in ordinary torch operators."""

from __future__ import annotations

from typing import Any

from hal.moe.torch_fp8_ops import torch_fp8_ops
from hal.moe.torch_ops import torch_ops
from hal.moe.torch_optimizer_ops import torch_optimizer_ops
from hal.moe.torch_training_ops import torch_training_ops


class Portable:
    """One object with the operators of several; the first that has one answers for it."""

    def __init__(self, *parts: object) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for part in self._parts:
                if hasattr(part, name):
                    return getattr(part, name)
        raise AttributeError(f"the portable implementation has no {name}")


portable = Portable(torch_ops, torch_training_ops, torch_optimizer_ops, torch_fp8_ops)
