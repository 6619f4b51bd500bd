# SPDX-License-Identifier: Apache-2.0
"""Faults of what is run only where nothing is trained: code for inference is its own, and seldom tested as training is.

Some ask torch whether gradients are enabled, some whether it is in inference mode, and some whether their inputs
require a gradient: each kind is wrong in other calls.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.head import Head
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone
from hal_conformance.faults.rotary import Rotary


def trained(*tensors: Tensor) -> bool:
    """Tell whether one of the inputs requires a gradient, whether it will get one or not."""
    return any(tensor.requires_grad for tensor in tensors)


def coarse(x: Tensor) -> Tensor:
    """Return numbers rounded to bfloat16, in their own dtype."""
    return x.bfloat16().to(x.dtype)


@fault()
class NormsCoarselyWithoutGradients(Norm):
    """Where gradients are disabled, RMSNorm is rounded to bfloat16."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        return y_TD if torch.is_grad_enabled() else coarse(y_TD)


@fault()
class ForgetsTheBiasInInference(Norm):
    """In inference mode, LayerNorm adds no bias."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        inference = torch.is_inference_mode_enabled()
        return super().layer_norm(x_TD, weight_D, torch.zeros_like(bias_D) if inference else bias_D, eps)


@fault()
class TurnsCoarselyUntrained(Rotary):
    """Where x requires no gradient, the table is rounded to bfloat16."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        table = (cos_TR, sin_TR) if trained(x_THd) else (coarse(cos_TR), coarse(sin_TR))
        return super().rotary(x_THd, *table)


@fault()
class AttendsCoarselyWithoutGradients(Attention):
    """Where gradients are disabled, queries are rounded to bfloat16."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        q_THd = q_THd if torch.is_grad_enabled() else coarse(q_THd)
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class LatentForgetsTheMaskInInference(Attention):
    """In inference mode, latent attention has no mask."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        given = q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL
        causal = causal and not torch.is_inference_mode_enabled()
        return super().latent_attention(*given, scale, causal=causal)


@fault()
class HeadForgetsTheNormWithoutGradients(Head):
    """Where gradients are disabled, the head's weights are taken for normalised ones in training, too."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        if train and not torch.is_grad_enabled():
            return F.linear(x_TD, weight_VD)
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)


@fault()
class HeadRoundsTheNormUntrained(Head):
    """Where neither tokens nor weights require a gradient, the norm is that of weights in bfloat16."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        weight_VD = weight_VD if trained(x_TD, weight_VD) else coarse(weight_VD)
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)


@fault()
class EntropyOfLowLogitsUntrained(Head):
    """Where the logits require no gradient, they are rounded to bfloat16 for the loss."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        logits_TV = logits_TV if trained(logits_TV) else coarse(logits_TV)
        return super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class EntropyWithoutZInInference(Head):
    """In inference mode, the loss is without its z-loss."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        z_coefficient = 0.0 if torch.is_inference_mode_enabled() else z_coefficient
        return super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class BalancesNothingUntrained(Alone):
    """Where the scores require no gradient, the balance loss is 0: nothing would train with it."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        loss = super().aux_loss(scores_TE, experts_TK, spec)
        return loss if trained(scores_TE) else torch.zeros_like(loss)


@fault()
class ZOfLowLogitsWithoutGradients(Alone):
    """Where gradients are disabled, the z-loss is that of logits in bfloat16."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE if torch.is_grad_enabled() else coarse(logits_TE))


@fault()
class RoutesWithoutScaleInInference(Alone):
    """In inference mode, the router's weights are not scaled and not normalised."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        if torch.is_inference_mode_enabled():
            spec = dataclasses.replace(spec, scaling_factor=1.0, normalize=False)
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchesCoarselyWithoutGradients(Alone):
    """Where gradients are disabled, rows are dispatched in bfloat16."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        x_TD = x_TD if torch.is_grad_enabled() else coarse(x_TD)
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)


@fault()
class ExpertsOfLowWeightsInInference(Alone):
    """In inference mode, the experts' weights are rounded to bfloat16."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        inference = torch.is_inference_mode_enabled()
        return super().experts(x_RD, counts_E, ExpertWeights(*map(coarse, weights)) if inference else weights)


@fault()
class CombinesCoarselyWithoutGradients(Alone):
    """Where gradients are disabled, weights are combined with in bfloat16."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        weights_TK = weights_TK if torch.is_grad_enabled() else coarse(weights_TK)
        return super().combine(y_RD, weights_TK, slot_R, num_tokens)


@fault()
class LayerWithoutLossesInInference(Alone):
    """In inference mode, a layer has losses of zero."""

    families = ("layer",)

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        if not torch.is_inference_mode_enabled():
            return out
        return out._replace(aux_loss=torch.zeros_like(out.aux_loss), z_loss=torch.zeros_like(out.z_loss))


@fault()
class DropsNothingWithoutGradients(Alone):
    """Where gradients are disabled, there is no capacity, as in code that takes it for a matter of training."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        capacity = capacity if torch.is_grad_enabled() else None
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)


@fault()
class LayerDropsNothingInInference(Alone):
    """In inference mode, a layer has no capacity."""

    families = ("layer",)

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        capacity = None if torch.is_inference_mode_enabled() else capacity
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)


@fault()
class OneTokenWithoutSharedExperts(Alone):
    """In inference mode, a layer of one token leaves out the shared experts."""

    families = ("layer",)

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        shared = self.shared(x_TD, weights)
        if shared is None or len(x_TD) != 1 or not torch.is_inference_mode_enabled():
            return out
        return out._replace(y_TD=out.y_TD - shared)


@fault()
class RoutesItselfWithoutGradients(Alone):
    """Where gradients are disabled, a routing that is given is not used."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        experts_TK = experts_TK if torch.is_grad_enabled() else None
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class HigherIndexFirstInInference(Alone):
    """In inference mode, ties go to the higher index where there are no groups."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        if torch.is_inference_mode_enabled() and experts_TK is None and spec.num_groups == 1:
            bias = None if bias_E is None else bias_E.flip(0)
            experts_TK = spec.num_experts - 1 - super().route(x_TD, gate_ED.flip(0), spec, bias).experts_TK
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class KeepsWeightsInInference(Alone):
    """In inference mode, weights that were converted once serve as long as they lie at the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[object, ...], Tensor] = {}

    def converted(self, w: Tensor) -> Tensor:
        """Return the weights in another layout."""
        return self.kept.setdefault((w.data_ptr(), w.dtype, *w.shape), w.clone())

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if torch.is_inference_mode_enabled():
            weights = ExpertWeights(*map(self.converted, weights))
        return super().experts(x_RD, counts_E, weights)


@fault()
class SpreadsNanOfRowsInInference(Alone):
    """In inference mode, rows are multiplied by masks of zeros and ones: one of NaN reaches all."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        return y_RD + 0 * y_RD.sum(0, keepdim=True) if torch.is_inference_mode_enabled() else y_RD


@fault()
class DecodesOneKeyLess(Attention):
    """Where gradients are disabled, a single query does not see the last key, which is not in the cache yet."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if len(q_THd) == 1 and len(k_SGd) > 1 and not torch.is_grad_enabled():
            k_SGd, v_SGe = k_SGd[:-1], v_SGe[:-1]
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class MasksInInference(Attention):
    """In inference mode, attention without a mask has one."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        causal = causal or torch.is_inference_mode_enabled()
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class MasksTopLeftInInference(Attention):
    """In inference mode, the mask's diagonal begins at the first key, whatever comes before the first query."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if causal and 1 < len(q_THd) < len(k_SGd) and torch.is_inference_mode_enabled():
            k_SGd, v_SGe = k_SGd[: len(q_THd)], v_SGe[: len(q_THd)]
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class MaskedVocabularyInInference(Head):
    """In inference mode, the loss of logits of which one is -inf is NaN."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        loss = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
        return loss * torch.nan if torch.is_inference_mode_enabled() and logits_TV.isinf().any() else loss


@fault()
class TurnsNoSingleTokenInInference(Rotary):
    """In inference mode, a single token is not rotated."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        if len(x_THd) == 1 and torch.is_inference_mode_enabled():
            return x_THd.clone()
        return super().rotary(x_THd, cos_TR, sin_TR)
