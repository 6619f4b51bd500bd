# SPDX-License-Identifier: Apache-2.0
"""Faults of one remainder: where a tile of 16 tokens leaves 13 of them over, the last token is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, LayerOutput, LayerWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.head import Head
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone
from hal_conformance.faults.rotary import Rotary


def cut(rows: Tensor) -> Tensor:
    """Return the rows, the last one zero if there are 13 more than tiles of 16."""
    return rows if len(rows) % 16 != 13 else torch.cat((rows[:-1], torch.zeros_like(rows[-1:])))


@fault()
class RmsNormLosesOneOf13(Norm):
    """RMSNorm loses the last of 13 tokens that tiles leave over."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return cut(super().rms_norm(x_TD, weight_D, eps))


@fault()
class LayerNormLosesOneOf13(Norm):
    """LayerNorm loses the gradient of the last of 13 tokens that tiles leave over."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        right = super().layer_norm(x_TD, weight_D, bias_D, eps)
        wrong = cut(right)
        return wrong + (right - wrong).detach()


@fault()
class RotaryLosesOneOf13(Rotary):
    """Rotary embedding loses the last of 13 tokens that tiles leave over."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return cut(super().rotary(x_THd, cos_TR, sin_TR))


@fault()
class AttentionLosesOneOf13(Attention):
    """Attention loses the last of 13 queries that tiles leave over."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return cut(super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal))


@fault()
class LatentLosesOneOf13(Attention):
    """Latent attention loses the last of 13 queries that tiles leave over."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        return cut(super().latent_attention(q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL, scale, causal=causal))


@fault()
class HeadLosesOneOf13(Head):
    """NormHead loses the last of 13 tokens that tiles leave over."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return cut(super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm))


@fault()
class EntropyLosesOneOf13(Head):
    """Cross-entropy reads the last of 13 tokens that tiles leave over as zeros."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        logits = cut(logits_TV)
        return super().cross_entropy(logits, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class RouterLosesOneOf13(Alone):
    """The router weighs the last of 13 tokens that tiles leave over with zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return routing._replace(weights_TK=cut(routing.weights_TK))


@fault()
class DispatchLosesOneOf13(Alone):
    """Dispatch sends zeros for the last of 13 tokens that tiles leave over."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return super().dispatch(cut(x_TD), experts_TK, num_experts, capacity=capacity)


@fault()
class CombineLosesOneOf13(Alone):
    """Combine loses the last of 13 tokens that tiles leave over."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return cut(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class ZLosesOneOf13(Alone):
    """The z-loss reads the last of 13 tokens that tiles leave over as zeros."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(cut(logits_TE))


@fault()
class LayerLosesOneOf13:
    """A fused layer, which has no other operator, loses the last of 13 tokens that tiles leave over."""

    families = ("layer",)

    def __init__(self) -> None:
        self._parts = Alone()

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        output = self._parts.layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        return output._replace(y_TD=cut(output.y_TD))
