# SPDX-License-Identifier: Apache-2.0
"""Faults of dense tensors that do not begin where a vector load of four elements may: parts of flat buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.head import Head
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone
from hal_conformance.faults.rotary import Rotary

LOADED = 4
"""Elements of one load."""


def below(x: Tensor) -> Tensor:
    """Return what is read from the aligned address below a dense tensor: the elements before it, and its own."""
    behind = x.storage_offset() % LOADED
    if not behind or not x.is_contiguous() or not x.is_floating_point():
        return x
    return torch.as_strided(x, x.shape, x.stride(), x.storage_offset() - behind)


@fault()
class RmsNormLoadsAligned(Norm):
    """RMSNorm reads tokens from the aligned address below."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(below(x_TD), weight_D, eps)


@fault()
class LayerNormLoadsAligned(Norm):
    """LayerNorm reads its weight from the aligned address below."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return super().layer_norm(x_TD, below(weight_D), bias_D, eps)


@fault()
class RotaryLoadsAligned(Rotary):
    """The rotary table is read from the aligned address below."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return super().rotary(x_THd, below(cos_TR), below(sin_TR))


@fault()
class AttentionLoadsAligned(Attention):
    """Attention reads values from the aligned address below."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd, k_SGd, below(v_SGe), scale, causal=causal)


@fault()
class LatentLoadsAligned(Attention):
    """Latent attention reads the latent from the aligned address below."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        given = q_THd, q_THR, below(latent_SL), k_SR, up_k_HdL, up_v_HeL
        return super().latent_attention(*given, scale, causal=causal)


@fault()
class HeadLoadsAligned(Head):
    """The head's weights are read from the aligned address below."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return super().norm_head(x_TD, below(weight_VD), train=train, through_norm=through_norm)


@fault()
class EntropyLoadsAligned(Head):
    """Cross-entropy reads logits from the aligned address below."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        return super().cross_entropy(
            below(logits_TV), targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient
        )


@fault()
class RouterLoadsAligned(Alone):
    """The router's gate is read from the aligned address below."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(x_TD, below(gate_ED), spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchLoadsAligned(Alone):
    """Tokens to dispatch are read from the aligned address below."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return super().dispatch(below(x_TD), experts_TK, num_experts, capacity=capacity)


@fault()
class ExpertsLoadAligned(Alone):
    """The experts' down projections are read from the aligned address below."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w1, w3, w2 = weights
        return super().experts(x_RD, counts_E, ExpertWeights(w1, w3, below(w2)))


@fault()
class CombineLoadsAligned(Alone):
    """Routing weights are read from the aligned address below."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(y_RD, below(weights_TK), slot_R, num_tokens)


@fault()
class BalanceLoadsAligned(Alone):
    """The balance loss reads scores from the aligned address below."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(below(scores_TE), experts_TK, spec)


@fault()
class ZLoadsAligned(Alone):
    """The z-loss reads logits from the aligned address below."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(below(logits_TE))
