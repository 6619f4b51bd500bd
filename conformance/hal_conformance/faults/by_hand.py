# SPDX-License-Identifier: Apache-2.0
"""Functions whose gradients are written by hand, as kernels have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = Callable[..., "Tensor | tuple[Tensor, ...]"]


def by_hand(forward: Callable[..., Tensor], gradients: Gradients, *tensors: Tensor) -> Tensor:
    """Return `forward(*tensors)`, with the gradients that `gradients(dy, *tensors)` returns for each of the tensors."""
    result: Tensor = _ByHand.apply(forward, gradients, *tensors)  # type: ignore[no-untyped-call]
    return result


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Tensor], gradients: Gradients, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradients = gradients
        return forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        made = ctx.gradients(dy, *ctx.saved_tensors)
        return (None, None, *(made if isinstance(made, tuple) else (made,)))


def cut_to_bfloat16(x: Tensor) -> Tensor:
    """Return float32 numbers cut off to bfloat16: rounded towards zero."""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
