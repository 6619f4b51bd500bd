# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine: copying tokens to their experts and adding up what comes back, in a fixed order.

Both directions, and both backward passes, only gather: no atomic addition is used, so the results do not
change from run to run on any device.

Legend: T tokens, D model dim, E routed experts, K choices per token, R routed rows; a slot is t * K + k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.errors import ShapeError
from hal.moe.checks import as_index, check_count, check_floating, check_range, check_same_device, check_shape
from hal.moe.ops import Dispatch
from hal.moe.precision import wide_dtype


def count(experts_sorted: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert occurs in ascending indices, int64 [N]: int64 [E]."""
    edges = torch.arange(num_experts + 1, device=experts_sorted.device)
    return torch.searchsorted(experts_sorted, edges).diff()


def dispatch(
    x_TD: Tensor,
    experts_TK: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    check_indices: bool = True,
) -> Dispatch:
    """Copy each token to its experts, rows sorted by expert, then by slot; see `MoEOps.dispatch`.

    Backward: a token's gradient is the sum of its rows' gradients in float32 over k = 0..K-1 in that order,
    cast to the dtype of `x_TD`. Zero tokens give zero rows. With a capacity the number of rows depends on the
    data, and the host waits for the device once; the check of the indices costs one more wait.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, an expert is out of range, or E or the capacity is no
            number of experts or rows.
    """
    where = "dispatch"
    check_shape(where, "x_TD", x_TD, ("T", "D"))
    check_floating(where, "x_TD", x_TD)
    check_shape(where, "experts_TK", experts_TK, (x_TD.shape[0], "K"))
    experts_TK = as_index(where, "experts_TK", experts_TK)
    check_same_device(where, x_TD=x_TD, experts_TK=experts_TK)
    check_count(where, "num_experts", num_experts, least=1)
    if capacity is not None:
        check_count(where, "capacity", capacity, least=0)
    if check_indices:
        check_range(where, "experts_TK", experts_TK, num_experts)
    num_slots = experts_TK.numel()
    # The sort is stable, so the slots of one expert keep their order.
    expert_R, slot_R = torch.sort(experts_TK.reshape(-1), stable=True)
    counts_E = count(expert_R, num_experts)
    if capacity is not None:
        first_E = counts_E.cumsum(0) - counts_E
        place_R = torch.arange(num_slots, device=slot_R.device) - first_E[expert_R]
        slot_R = slot_R[place_R < capacity]
        counts_E = counts_E.clamp(max=capacity)
    row_TK = _rows_of_slots(slot_R, num_slots).view(experts_TK.shape)
    x_RD: Tensor = _Spread.apply(x_TD, slot_R, row_TK)  # type: ignore[no-untyped-call]
    return Dispatch(x_RD, slot_R, counts_E)


def combine(
    y_RD: Tensor,
    weights_TK: Tensor,
    slot_R: Tensor,
    num_tokens: int,
    *,
    check_indices: bool = True,
) -> Tensor:
    """Add up each token's rows, weighted; see `MoEOps.combine`.

    A NaN or an infinity reaches only the token whose row or weight it is. A slot without a row adds nothing,
    whatever its weight, and that weight's gradient is zero. Backward: dy = w * dout of the row's token,
    rounded once to the dtype of `y_RD`; dw = the row times dout, multiplied and summed over D in float32.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, or a slot is out of range or occurs twice (one check, for
            which the host waits for the device once).
    """
    where = "combine"
    check_count(where, "num_tokens", num_tokens, least=0)
    check_shape(where, "y_RD", y_RD, ("R", "D"))
    check_floating(where, "y_RD", y_RD)
    check_shape(where, "weights_TK", weights_TK, (num_tokens, "K"))
    check_floating(where, "weights_TK", weights_TK)
    check_shape(where, "slot_R", slot_R, (y_RD.shape[0],))
    slot_R = as_index(where, "slot_R", slot_R)
    check_same_device(where, y_RD=y_RD, weights_TK=weights_TK, slot_R=slot_R)
    num_slots = weights_TK.numel()
    if check_indices:
        check_range(where, "slot_R", slot_R, num_slots)
    row_S = _rows_of_slots(slot_R, num_slots)
    if check_indices and slot_R.numel():
        rows_R = torch.arange(slot_R.numel(), device=slot_R.device)
        if bool((row_S[slot_R] != rows_R).any()):
            raise ShapeError(f"{where}: slot_R names a slot twice", expected="each slot at most once")
    out_TD: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        y_RD, weights_TK, slot_R, row_S.view(weights_TK.shape)
    )
    return out_TD


def _rows_of_slots(slot_R: Tensor, num_slots: int) -> Tensor:
    """Return which row answers each slot, int64; R, one past the last row, for a slot that was dropped."""
    num_rows = slot_R.numel()
    row_S = torch.full((num_slots,), num_rows, dtype=torch.int64, device=slot_R.device)
    return row_S.scatter_(0, slot_R, torch.arange(num_rows, device=slot_R.device))


def _sum_choices(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Return sum_k w_tk rows[row_tk] for each token, in `wide_dtype`, over k = 0..K-1 in that order."""
    wide = wide_dtype(rows_RD.dtype)
    num_rows, width = rows_RD.shape
    num_choices = row_TK.shape[1]
    if num_rows < row_TK.numel():  # some slots have no row: let them find one of zeros
        rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, width)])
        if weights_TK is not None:
            weights_TK = weights_TK.masked_fill(row_TK == num_rows, 0.0)
    if num_choices == 0:
        return rows_RD.new_zeros(row_TK.shape[0], width, dtype=wide)
    total_TD: Tensor | None = None
    for k in range(num_choices):
        term_TD = rows_RD[row_TK[:, k]].to(wide)
        if weights_TK is not None:
            term_TD = term_TD * weights_TK[:, k, None].to(wide)
        total_TD = term_TD if total_TD is None else total_TD + term_TD
    assert total_TD is not None
    return total_TD


class _Spread(torch.autograd.Function):
    """x_TD to rows. Plain indexing would add the gradients with atomics, in an order that varies."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD[slot_R // max(row_TK.shape[1], 1)]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (row_TK,) = ctx.saved_tensors
        return _sum_choices(grad_RD, row_TK).to(grad_RD.dtype), None, None


class _Combine(torch.autograd.Function):
    """Rows to tokens. Autograd's own backward of K gathers would hold K gradients of the size of y_RD at
    once."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, slot_R)
        return _sum_choices(y_RD, row_TK, weights_TK).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, weights_TK, slot_R = ctx.saved_tensors
        wide = wide_dtype(y_RD.dtype)
        grad_RD = grad_TD[slot_R // max(weights_TK.shape[1], 1)].to(wide)
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_y = (grad_RD * weights_TK.reshape(-1)[slot_R, None].to(wide)).to(y_RD.dtype)
        if ctx.needs_input_grad[1]:
            per_row_R = (grad_RD * y_RD.to(wide)).sum(dim=-1).to(weights_TK.dtype)
            grad_weights = torch.zeros_like(weights_TK).reshape(-1).scatter(0, slot_R, per_row_R)
            grad_weights = grad_weights.view(weights_TK.shape)
        return grad_y, grad_weights, None, None
