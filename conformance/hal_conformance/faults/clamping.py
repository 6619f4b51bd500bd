# SPDX-License-Identifier: Apache-2.0
"""The identity with infinities replaced by the largest finite numbers, in its result or in its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, back: bool) -> Tensor:
        ctx.back = back
        return x.view_as(x) if back else _clamp(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (_clamp(gradient) if ctx.back else gradient), None


def _clamp(x: Tensor) -> Tensor:
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)  # NaN stays


def clamped(x: Tensor) -> Tensor:
    """Return x without infinities; its gradient is the result's."""
    found: Tensor = _Clamped.apply(x, False)  # type: ignore[no-untyped-call]
    return found


def with_clamped_gradient(x: Tensor) -> Tensor:
    """Return x, whose gradient has no infinities."""
    found: Tensor = _Clamped.apply(x, True)  # type: ignore[no-untyped-call]
    return found
