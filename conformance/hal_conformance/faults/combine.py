# SPDX-License-Identifier: Apache-2.0
"""Faults of combine: how rows come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts, by_token, gradient_of, spread_backward, weighted


@fault("DeepEP#402")
class CombinesInBfloat16(Parts):
    """The sum over the choices is kept in bfloat16."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        total = torch.zeros(num_tokens, y_RD.shape[1], dtype=torch.bfloat16, device=y_RD.device)
        for term_TD in weighted(y_RD, weights_TK, slot_R).unbind(1):
            total = total + term_TD.bfloat16()
        return total.to(y_RD.dtype)


@fault("TransformerEngine#1336")
class RoundsProducts(Parts):
    """Each weighted row is rounded to the dtype before they are added in float32."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        terms = weighted(y_RD, weights_TK, slot_R)
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
class SpreadsNanOfTokens(Alone):
    """A NaN in the gradient of one combined token reaches the rows of all."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return spread_backward(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class OneTokenUnweighted(Alone):
    """With one token the rows are added without their weights."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        given = torch.ones_like(weights_TK) if num_tokens == 1 else weights_TK
        return super().combine(y_RD, given, slot_R, num_tokens)


@fault()
class OneChoiceUnweighted(Alone):
    """With K = 1 the rows are returned as they are."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        given = torch.ones_like(weights_TK) if weights_TK.shape[1] == 1 else weights_TK
        return super().combine(y_RD, given, slot_R, num_tokens)


@fault()
class SkipsZeroWeights(Alone):
    """A weight of zero has a gradient of zero, since its row is skipped."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        given = gradient_of(weights_TK, weights_TK * (weights_TK != 0))
        return super().combine(y_RD, given, slot_R, num_tokens)


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


class _Clamped(torch.autograd.Function):
    """The largest finite number for infinities; the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        most = torch.finfo(rows.dtype).max
        return rows.clamp(-most, most)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _clamped(rows: Tensor) -> Tensor:
    clamped: Tensor = _Clamped.apply(rows)  # type: ignore[no-untyped-call]
    return clamped


@fault()
class ClampsInfiniteRows(Alone):
    """Infinite rows count as the largest finite number."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(_clamped(y_RD), weights_TK, slot_R, num_tokens)


@fault()
class SaturatesTheSum(Alone):
    """A sum beyond the dtype is stored as its largest finite number."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return _clamped(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class RowsNeedTrainedWeights(Alone):
    """Rows have a gradient of zero unless the routing weights are trained, too."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        given = y_RD if weights_TK.requires_grad else gradient_of(y_RD, y_RD * 0)
        return super().combine(given, weights_TK, slot_R, num_tokens)


@fault()
class WeightsNeedTrainedRows(Alone):
    """Routing weights have a gradient of zero unless the rows are trained, too."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        given = weights_TK if y_RD.requires_grad else gradient_of(weights_TK, weights_TK * 0)
        return super().combine(y_RD, given, slot_R, num_tokens)


@fault()
class NanOfNothing(Alone):
    """Without a single row every token is 0 / 0."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return y_TD if len(y_RD) else y_TD + torch.nan


@fault()
class WeighsWhatWasDropped(Alone):
    """A slot without a row adds its weight times zero, which is NaN where the weight is not finite."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        _, left = by_token(y_RD, weights_TK.detach(), slot_R)
        nothing = ((weights_TK.detach() - left) * 0).sum(1, keepdim=True)
        return super().combine(y_RD, weights_TK, slot_R, num_tokens) + nothing.to(y_RD.dtype)


@fault()
class CombinesNoNegativeWeights(Parts):
    """Weights below zero are taken for zero, as if every router's were those of a softmax."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(y_RD, weights_TK.clamp(min=0.0), slot_R, num_tokens)
