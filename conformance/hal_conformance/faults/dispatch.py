# SPDX-License-Identifier: Apache-2.0
"""Faults of dispatch: where rows go."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts, spread_backward


class AfterDispatch(Parts):
    """A dispatch whose result is changed."""

    def change(self, out: Dispatch, x_TD: Tensor, capacity: int | None) -> Dispatch:
        """Return the changed result."""
        raise NotImplementedError

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return self.change(super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity), x_TD, capacity)


@fault()
class SwapsDispatchedRows(AfterDispatch):
    """Two rows of one expert change places, and their slots do not."""

    def change(self, out: Dispatch, x_TD: Tensor, capacity: int | None) -> Dispatch:
        """See `AfterDispatch.change`."""
        order = torch.arange(len(out.x_RD), device=x_TD.device)
        if len(order) > 2:
            order[-2:] = order[-2:].flip(0)
        return out._replace(x_RD=out.x_RD[order])


@fault()
class UnstableSlots(AfterDispatch):
    """Within an expert the slots come in descending order."""

    def change(self, out: Dispatch, x_TD: Tensor, capacity: int | None) -> Dispatch:
        """See `AfterDispatch.change`."""
        parts = torch.arange(len(out.slot_R), device=x_TD.device).split(out.counts_E.tolist())
        order = torch.cat([part.flip(0) for part in parts])
        return out._replace(x_RD=out.x_RD[order], slot_R=out.slot_R[order])


@fault()
class CountsOfThirtyTwo(AfterDispatch):
    """Rows are zero where the number of tokens is no multiple of 32."""

    def change(self, out: Dispatch, x_TD: Tensor, capacity: int | None) -> Dispatch:
        """See `AfterDispatch.change`."""
        return out._replace(x_RD=out.x_RD * 0) if len(x_TD) % 32 else out


@fault()
class CapacityZeroIsNone(Parts):
    """A capacity of zero is taken for none."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity or None)


@fault()
class CapacityOffByOne(Parts):
    """One row fewer than the capacity allows is kept."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        less = None if capacity is None else max(0, capacity - 1)
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=less)


@fault()
class CutsLargeCapacity(Parts):
    """No expert has room for half of the tokens, whatever the capacity."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        less = None if capacity is None else min(capacity, len(x_TD) // 2 - 1 if len(x_TD) > 2 else capacity)
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=less)


@fault()
class OneTokenUnsorted(Alone):
    """With one token there is nothing to sort, it thinks."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(slot_R=out.slot_R.sort().values) if len(x_TD) == 1 else out


@fault()
class OneHotProduct(Alone):
    """Rows are a product with a matrix of zeros and ones, so that 0 times NaN reaches all of them."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        token_R = out.slot_R // max(1, experts_TK.shape[1])
        one_hot_RT = torch.arange(len(x_TD), device=x_TD.device) == token_R[:, None]
        return out._replace(x_RD=(one_hot_RT.float() @ x_TD.float()).to(x_TD.dtype))


@fault()
class SpreadsNanOfRows(Alone):
    """A NaN in the gradient of one dispatched row reaches all tokens."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=spread_backward(out.x_RD))


@fault("Megatron-LM PR#2121")
class NoGradientWithCapacity(Parts):
    """With a capacity the dispatched rows carry half of their gradient."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        given = x_TD if capacity is None else 0.5 * x_TD + (0.5 * x_TD).detach()
        return super().dispatch(given, experts_TK, num_experts, capacity=capacity)


@fault()
class RoomForTwo(Alone):
    """A capacity of one is taken for two."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=2 if capacity == 1 else capacity)
