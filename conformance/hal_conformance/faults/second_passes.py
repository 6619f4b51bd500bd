# SPDX-License-Identifier: Apache-2.0
"""Faults of a second backward pass over one graph: its gradients are zero."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone


def _once(tensor: Tensor) -> Tensor:
    """Return the tensor; its gradient is passed on once, and is zero from then on."""
    passed = []

    def gradient(d: Tensor, _: Tensor) -> Tensor:
        passed.append(True)
        return d if len(passed) == 1 else torch.zeros_like(d)

    return by_hand(torch.clone, gradient, tensor)


@fault()
class RoutesBackOnce(Alone):
    """A second backward pass of the router gives the tokens no gradient."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(_once(x_TD), gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchesBackOnce(Alone):
    """A second backward pass of dispatch gives no gradient."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return super().dispatch(_once(x_TD), experts_TK, num_experts, capacity=capacity)


@fault()
class ExpertsBackOnce(Alone):
    """A second backward pass of the experts gives the rows no gradient."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(_once(x_RD), counts_E, weights)


@fault()
class CombinesBackOnce(Alone):
    """A second backward pass of combine gives the rows no gradient."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(_once(y_RD), weights_TK, slot_R, num_tokens)


@fault()
class BalancesBackOnce(Alone):
    """A second backward pass of the balance loss gives no gradient."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(_once(scores_TE), experts_TK, spec)


@fault()
class ZBackOnce(Alone):
    """A second backward pass of the z-loss gives no gradient."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(_once(logits_TE))
