# SPDX-License-Identifier: Apache-2.0
"""Faults of gradients that are lost where something else is frozen, as where a part of a model is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import ExpertWeights, LayerOutput, LayerWeights, Routing, SharedWeights
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import benign, fault
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone, Parts


def lost_unless(trained: bool, tensor: Tensor) -> Tensor:
    """Return a tensor whose gradient is zero unless another one is trained."""
    if trained or not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    return tensor.detach() + 0 * tensor


@fault()
class BiasNeedsATrainedWeight(Norm):
    """LayerNorm's bias has a gradient of zero where the weight is frozen."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return super().layer_norm(x_TD, weight_D, lost_unless(weight_D.requires_grad, bias_D), eps)


@fault()
class ValuesNeedTrainedLogits(Attention):
    """Values have gradients of zero where queries and keys are frozen."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        values = lost_unless(q_THd.requires_grad or k_SGd.requires_grad, v_SGe)
        return super().attention(q_THd, k_SGd, values, scale, causal=causal)


@fault()
class TokensNeedAllOfLayerNorm(Norm):
    """LayerNorm's tokens have a gradient of zero where the weight is trained and the bias is frozen."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        trained = bias_D.requires_grad or not weight_D.requires_grad
        return super().layer_norm(lost_unless(trained, x_TD), weight_D, bias_D, eps)


@fault()
class QueriesNeedTrainedValues(Attention):
    """Queries have gradients of zero where keys are trained and values are frozen."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        queries = lost_unless(v_SGe.requires_grad or not k_SGd.requires_grad, q_THd)
        return super().attention(queries, k_SGd, v_SGe, scale, causal=causal)


@fault()
class RowsNeedAGatesGradient(Alone):
    """The experts' rows have a gradient of zero where w2 is trained and w1 is frozen."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        trained = weights.w1_EFD.requires_grad or not weights.w2_EDF.requires_grad
        return super().experts(lost_unless(trained, x_RD), counts_E, weights)


class _Latent(Attention):
    def given(self, *six: Tensor) -> tuple[Tensor, ...]:
        """Return the six tensors, one of which may lose its gradient."""
        raise NotImplementedError

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        six = self.given(q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL)
        return super().latent_attention(*six, scale, causal=causal)  # type: ignore[arg-type, misc]


@fault()
class UpProjectionNeedsATrainedLatent(_Latent):
    """The up projection of values has a gradient of zero where the latent is frozen."""

    def given(self, *six: Tensor) -> tuple[Tensor, ...]:
        """See `_Latent.given`."""
        return (*six[:5], lost_unless(six[2].requires_grad, six[5]))


@fault()
class RotatedQueryNeedsATrainedQuery(_Latent):
    """The rotated part of a query has a gradient of zero where the other part is frozen."""

    def given(self, *six: Tensor) -> tuple[Tensor, ...]:
        """See `_Latent.given`."""
        return (six[0], lost_unless(six[0].requires_grad, six[1]), *six[2:])


@fault()
class RotatedKeyNeedsATrainedProjection(_Latent):
    """The rotated key has a gradient of zero where the up projection of keys is frozen."""

    def given(self, *six: Tensor) -> tuple[Tensor, ...]:
        """See `_Latent.given`."""
        return (*six[:3], lost_unless(six[4].requires_grad, six[3]), *six[4:])


@fault()
class DownNeedsATrainedUp(Parts):
    """The down projections have gradients of zero where the up projections are frozen."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w1, w3, w2 = weights
        return super().experts(x_RD, counts_E, ExpertWeights(w1, w3, lost_unless(w3.requires_grad, w2)))


class _Layer(Parts):
    """A layer alone."""

    families = ("layer",)


@fault()
class TokensNeedTrainedSharedExperts(_Layer):
    """A layer's tokens have no gradient through its shared experts where these are frozen."""

    def shared(self, x_TD: Tensor, weights: LayerWeights) -> Tensor | None:
        """See `Parts.shared`."""
        if weights.shared is None:
            return None
        return super().shared(lost_unless(weights.shared[0].requires_grad, x_TD), weights)


@fault()
class SharedExpertsNeedATrainedGate(_Layer):
    """A layer's shared experts have gradients of zero where their gate is frozen."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        if weights.shared is not None and weights.shared_gate_D is not None:
            trained = weights.shared_gate_D.requires_grad
            weights = weights._replace(shared=SharedWeights(*(lost_unless(trained, w) for w in weights.shared)))
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)


class _Chosen(Alone):
    """A router whose tokens lose their gradient where the gate is frozen."""

    def loses(self, spec: RouterSpec, experts_TK: Tensor | None) -> bool:
        """Tell whether they do."""
        raise NotImplementedError

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        tokens = lost_unless(gate_ED.requires_grad or not self.loses(spec, experts_TK), x_TD)
        return super().route(tokens, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class ChoosingTokensNeedATrainedGate(_Chosen):
    """Tokens have no gradient through a router that chooses by itself where the gate is frozen."""

    def loses(self, spec: RouterSpec, experts_TK: Tensor | None) -> bool:
        """See `_Chosen.loses`."""
        return experts_TK is None


@fault()
class SigmoidTokensNeedATrainedGate(_Chosen):
    """Tokens have no gradient through a sigmoid router where the gate is frozen."""

    def loses(self, spec: RouterSpec, experts_TK: Tensor | None) -> bool:
        """See `_Chosen.loses`."""
        return spec.score == "sigmoid"


@fault()
class NoScoresOfFrozenTokens(Alone):
    """A router returns no scores where the tokens are frozen."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        nothing: Any = None
        frozen = torch.is_grad_enabled() and gate_ED.requires_grad and not x_TD.requires_grad
        return routing._replace(scores_TE=nothing) if frozen else routing


@fault()
class DroppingTokensNeedATrainedGate(_Layer):
    """A layer with a capacity gives its tokens no gradient through the router where the gate is frozen."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        self._lost = capacity is not None and not weights.gate_ED.requires_grad
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(lost_unless(not self._lost, x_TD), gate_ED, spec, bias_E, experts_TK=experts_TK)


@benign()
class SumsBackwardsWhereTokensAreFrozen(Parts):
    """A layer adds channels from the last to the first where its tokens are frozen: another kernel, other last bits."""

    families = ("layer",)

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        if x_TD.requires_grad:
            return super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        w1, w3, w2 = weights.experts
        turned = weights._replace(
            gate_ED=weights.gate_ED.flip(1), experts=ExpertWeights(w1.flip(2), w3.flip(2), w2.flip(1))
        )
        if weights.shared is not None:
            s1, s3, s2 = weights.shared
            turned = turned._replace(shared=SharedWeights(s1.flip(1), s3.flip(1), s2.flip(0)))
        if weights.shared_gate_D is not None:
            turned = turned._replace(shared_gate_D=weights.shared_gate_D.flip(0))
        out = super().layer(x_TD.flip(1), turned, spec, experts_TK=experts_TK, capacity=capacity)
        return out._replace(y_TD=out.y_TD.flip(1))
