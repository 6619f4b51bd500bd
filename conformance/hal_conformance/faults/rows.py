# SPDX-License-Identifier: Apache-2.0
"""Faults of dispatch and combine: where rows go, and how they come back."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Parts, weighted


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


@fault("Megatron-LM PR#2121")
class NoGradientWithCapacity(Parts):
    """With a capacity the dispatched rows carry half of their gradient."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        given = x_TD if capacity is None else 0.5 * x_TD + (0.5 * x_TD).detach()
        return super().dispatch(given, experts_TK, num_experts, capacity=capacity)


@fault("DeepEP#402")
class CombinesInBfloat16(Parts):
    """The sum over the choices is kept in bfloat16."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        total = torch.zeros(num_tokens, y_RD.shape[1], dtype=torch.bfloat16, device=y_RD.device)
        for term_TD in weighted(y_RD, weights_TK, slot_R, num_tokens).unbind(1):
            total = total + term_TD.bfloat16()
        return total.to(y_RD.dtype)


@fault("TransformerEngine#1336")
class RoundsProducts(Parts):
    """Each weighted row is rounded to the dtype before they are added in float32."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        terms = weighted(y_RD, weights_TK, slot_R, num_tokens)
        low = torch.bfloat16 if y_RD.dtype == torch.float32 else y_RD.dtype
        return terms.to(low).float().sum(1).to(y_RD.dtype)


@fault("sglang PR#24850")
class DirtySlots(Parts):
    """A slot without a row adds what lies in row 0."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        if len(slot_R) == weights_TK.numel() or not len(y_RD):
            return y_TD
        empty = torch.ones(weights_TK.numel(), dtype=torch.bool, device=y_RD.device).index_fill(0, slot_R, False)
        share = (weights_TK * empty.view(weights_TK.shape)).float().sum(1, keepdim=True)
        return (y_TD.float() + share * y_RD[0].float()).to(y_RD.dtype)


@fault()
class SpreadsNan(Parts):
    """One NaN row makes all tokens NaN."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return y_TD * torch.nan if y_RD.isnan().any() else y_TD


@fault()
class LosesTokensOfCombine(Parts):
    """Tokens beyond the last multiple of 32 are zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        keep = torch.arange(num_tokens, device=y_RD.device) < num_tokens // 32 * 32
        return super().combine(y_RD, weights_TK, slot_R, num_tokens) * keep[:, None].to(y_RD.dtype)


@fault()
class DenseUpstream(Parts):
    """The backward pass of combine takes its upstream gradient for dense in memory."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        if y_TD.requires_grad:
            y_TD.register_hook(lambda gradient: gradient if gradient.is_contiguous() else gradient * 0)
        return y_TD


@fault()
class LowWeightGradient(Parts):
    """The routing weights are rounded to bfloat16 in the backward pass."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        low = weights_TK.bfloat16().to(weights_TK.dtype)
        return super().combine(y_RD, low + (weights_TK - low).detach(), slot_R, num_tokens)
