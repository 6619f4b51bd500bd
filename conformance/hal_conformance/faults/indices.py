# SPDX-License-Identifier: Apache-2.0
"""Faults of operators that take indices or counts of 64 bits only."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone


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
