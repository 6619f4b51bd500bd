# SPDX-License-Identifier: Apache-2.0
"""Faults of operators that take indices or counts of 64 bits only."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.head import Head
from hal_conformance.faults.parts import Alone


def _wide(indices: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"expected scalar type Int or Long but found {indices.dtype}")


def _long(indices: Tensor | None) -> None:
    if indices is not None and indices.dtype != torch.int64:
        raise RuntimeError(f"expected scalar type Long but found {indices.dtype}")


@fault()
class ReplaysLongOnly(Alone):
    """A router fails where the routing that is replayed is not int64."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        _long(experts_TK)
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchesLongOnly(Alone):
    """Dispatch fails where experts are not int64."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        _long(experts_TK)
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)


@fault()
class PairsCounts(Alone):
    """The experts read counts of 32 bits in pairs, as if they were of 64."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if counts_E.dtype != torch.int32:
            return super().experts(x_RD, counts_E, weights)
        half = counts_E.new_zeros(len(counts_E)).index_copy(
            0, torch.arange(len(counts_E[::2]), device=counts_E.device), counts_E[::2]
        )
        half[-1] += counts_E.sum() - half.sum()
        return super().experts(x_RD, half, weights)


@fault()
class CombinesLongOnly(Alone):
    """Combine fails where slots are not int64."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        _long(slot_R)
        return super().combine(y_RD, weights_TK, slot_R, num_tokens)


@fault()
class BalancesLongOnly(Alone):
    """The balance loss fails where experts are not int64."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        _long(experts_TK)
        return super().aux_loss(scores_TE, experts_TK, spec)


@fault()
class SlotsInTheDtypeOfExperts(Alone):
    """Dispatch returns slots that were computed in the dtype of the experts, which may be too small for them."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`: the key that is sorted, expert times slots plus slot, loses its upper bits."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        if capacity is not None or experts_TK.dtype == torch.int64:
            return out
        key = experts_TK.to(torch.int64).flatten() * experts_TK.numel()
        slot_R = (key + torch.arange(len(key), device=key.device)).to(experts_TK.dtype).argsort(stable=True)
        return out._replace(x_RD=x_TD[slot_R // experts_TK.shape[1]], slot_R=slot_R)


@fault()
class DispatchesWideOnly(Alone):
    """Dispatch fails where experts are neither int32 nor int64."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        _wide(experts_TK)
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)


@fault()
class EntropyOfLongOnly(Head):
    """Cross-entropy fails where targets are not int64, as torch's own does."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        _long(targets_T)
        return super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
