# SPDX-License-Identifier: Apache-2.0
"""Faults where a size is one, or where nothing is left to choose: special cases, and axes that are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, gradient_of


@fault()
class OneHeadUnscaled(Attention):
    """Where there is one query head, logits are not scaled."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd, k_SGd, v_SGe, 1.0 if q_THd.shape[1] == 1 else scale, causal=causal)


@fault()
class OneLatentHeadWithoutRotation(Attention):
    """Where there is one query head, the rotated key of latent attention has no gradient that is not zero."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        k_SR = gradient_of(k_SR, 0.0 * k_SR) if q_THd.shape[1] == 1 else k_SR
        return super().latent_attention(q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL, scale, causal=causal)


@fault()
class EqualWeightsOfAllExperts(Alone):
    """Where every expert is chosen, all have the same weight."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if spec.top_k < spec.num_experts:
            return out
        return out._replace(weights_TK=torch.full_like(out.weights_TK, spec.scaling_factor / spec.top_k))


@fault()
class AllExpertsInOrder(Alone):
    """Where every expert is chosen, they come by index, not by score."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        if spec.top_k == spec.num_experts and experts_TK is None:
            experts_TK = torch.arange(spec.top_k, device=x_TD.device).expand(len(x_TD), -1).contiguous()
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class CountsNothingOfTheOnlyExpert(Alone):
    """Of one expert, dispatch gives the number of experts for that of its rows."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(counts_E=torch.ones_like(out.counts_E)) if num_experts == 1 else out


@fault()
class TheOnlyExpertsGateIsFrozen(Alone):
    """Of one expert, the gate projection has no gradient that is not zero."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if len(counts_E) == 1:
            weights = weights._replace(w1_EFD=gradient_of(weights.w1_EFD, 0.0 * weights.w1_EFD))
        return super().experts(x_RD, counts_E, weights)


@fault()
class BalancesNoOneChoice(Alone):
    """Where each token has one expert, the balance loss is that of two choices, its half."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE, experts_TK, spec) / (2.0 if experts_TK.shape[1] == 1 else 1.0)
