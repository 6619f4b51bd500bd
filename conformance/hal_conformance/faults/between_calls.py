# SPDX-License-Identifier: Apache-2.0
"""Faults of operators that keep something from one call to another: stale copies and plans, the last call's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hal.moe.fp8_ops import FP8Format, MXFormat, Scaled
from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights, Routing, SharedWeights
from hal.moe.optimizer_ops import Clipped
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.fp8 import FP8
from hal_conformance.faults.head import Head
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone, gradient_of
from hal_conformance.faults.rotary import Rotary
from hal_conformance.faults.written import Gradients, Tensors


class Copies:
    """What tensors held when they were seen first, by their address; they are kept alive, as a module keeps its own."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy, through which gradients pass."""
        key = (tensor.data_ptr(), tensor.dtype, *tensor.shape, *tensor.stride())
        if key not in self._held:
            self._held[key] = tensor.detach(), tensor.detach().clone()
        return _served(self._held[key][1], tensor)


class OfParameters:
    """What tensors held when they were seen first, for as long as the object lives: it is written into all the same."""

    def __init__(self) -> None:
        self._held = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy, through which gradients pass."""
        return _served(self._held.setdefault(tensor, tensor.detach().clone()), tensor)


def _served(copy: Tensor, instead_of: Tensor) -> Tensor:
    passes = instead_of.requires_grad and torch.is_grad_enabled()
    return gradient_of(copy, instead_of) if passes else copy.clone()


def _copied(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.detach().clone() if isinstance(one, Tensor) else one for one in given)


class LastCall:
    """An operator whose backward pass takes its tensors from the last call, not from its own.

    Args:
        buffers: which of as many calls, in turn.
    """

    def __init__(self, buffers: int = 1) -> None:
        self._given: list[tuple[Any, ...]] = [()] * buffers
        self._calls = 0

    def __call__(self, operator: Callable[..., Tensor], *given: Any) -> Tensor:
        """Return the operator's result, a tensor, for tensors and other things that are its arguments."""
        if not torch.is_grad_enabled() or not any(isinstance(one, Tensor) and one.requires_grad for one in given):
            return operator(*given)
        result: Tensor = _OfTheLastCall.apply(self, operator, *given)  # type: ignore[no-untyped-call]
        return result

    def keep(self, given: tuple[Any, ...]) -> int:
        """Overwrite what an earlier call left; return where this one's lies."""
        buffer = self._calls % len(self._given)
        self._calls += 1
        self._given[buffer] = _copied(given)
        return buffer

    def gradients(
        self, buffer: int, operator: Callable[..., Tensor], asked: list[bool], upstream: Tensor
    ) -> list[Tensor | None]:
        """Return the gradients that are asked for, of what was kept."""
        given = [one.requires_grad_() if need else one for one, need in zip(self._given[buffer], asked, strict=True)]
        with torch.enable_grad():
            result = operator(*given)
        wanted = [one for one, need in zip(given, asked, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, upstream, allow_unused=True))
        return [next(found) if need else None for need in asked]


class Stacked(LastCall):
    """An operator whose backward pass takes what was put on a stack last, as if passes came in the reverse order."""

    def keep(self, given: tuple[Any, ...]) -> int:
        """See `LastCall.keep`: the first place is that of what was taken."""
        self._given.append(_copied(given))
        return 0

    def gradients(
        self, buffer: int, operator: Callable[..., Tensor], asked: list[bool], upstream: Tensor
    ) -> list[Tensor | None]:
        """See `LastCall.gradients`."""
        self._given[buffer] = self._given.pop()
        return super().gradients(buffer, operator, asked, upstream)


class InEvaluation:
    """What tensors held when they were seen first where nothing is trained; in training they are read anew."""

    def __init__(self) -> None:
        self._parameters = OfParameters()

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy, or the tensor."""
        return tensor if torch.is_grad_enabled() else self._parameters.of(tensor)


class _OfTheLastCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: LastCall, operator: Callable[..., Tensor], *given: Any) -> Tensor:
        ctx.last, ctx.operator, ctx.buffer = last, operator, last.keep(given)
        return operator(*(one.detach() if isinstance(one, Tensor) else one for one in given))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, *ctx.last.gradients(ctx.buffer, ctx.operator, list(ctx.needs_input_grad[2:]), upstream[0])


class _Keeping:
    """Comes before the operators that keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.of_parameters = Copies(), OfParameters()
        self.last, self.in_two_buffers, self.stacked = LastCall(), LastCall(2), Stacked()
        self.in_evaluation = InEvaluation()


# Stale copies ------------------------------------------------------------------------------------------------------


@fault()
class KeepsTheWeightOfRmsNorm(_Keeping, Norm):
    """RMSNorm's weight, once converted, serves as long as it lies at the same address."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(x_TD, self.copies.of(weight_D), eps)


@fault()
class KeepsTheBiasOfLayerNorm(_Keeping, Norm):
    """LayerNorm's bias, once converted, serves as long as it lies at the same address."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return super().layer_norm(x_TD, weight_D, self.copies.of(bias_D), eps)


@fault()
class KeepsTheRotaryTable(Rotary):
    """The rotary table is kept for its shape and dtype, whatever is in it."""

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        key = (cos_TR.dtype, *cos_TR.shape)
        cos, sin = self._tables.setdefault(key, (cos_TR.detach().clone(), sin_TR.detach().clone()))
        return super().rotary(x_THd, cos, sin)


@fault()
class KeepsTheUpProjections(_Keeping, Attention):
    """Latent attention absorbs its up projections once for an address."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        ups = self.copies.of(up_k_HdL), self.copies.of(up_v_HeL)
        return super().latent_attention(q_THd, q_THR, latent_SL, k_SR, *ups, scale, causal=causal)


@fault()
class PlansTargetsOnce(_Keeping, Head):
    """Cross-entropy sorts its targets once for an address, as in a captured graph."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        targets = self.copies.of(targets_T)
        return super().cross_entropy(logits_TV, targets, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class KeepsTheGate(_Keeping, Alone):
    """The router's gate, once converted to float32, serves as long as it lies at the same address."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(x_TD, self.copies.of(gate_ED), spec, bias_E, experts_TK=experts_TK)


@fault()
class KeepsTheBias(_Keeping, Alone):
    """The selection bias, which changes with every step, serves as long as it lies at the same address."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        bias = None if bias_E is None else self.copies.of(bias_E)
        return super().route(x_TD, gate_ED, spec, bias, experts_TK=experts_TK)


@fault()
class PlansDispatchOnce(_Keeping, Alone):
    """Dispatch sorts its choices once for an address."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return super().dispatch(x_TD, self.copies.of(experts_TK), num_experts, capacity=capacity)


@fault()
class PlansCombineOnce(_Keeping, Alone):
    """Combine inverts its slots once for an address."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(y_RD, weights_TK, self.copies.of(slot_R), num_tokens)


@fault()
class CountsOnce(_Keeping, Alone):
    """The balance loss counts choices once for an address."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE, self.copies.of(experts_TK), spec)


@fault()
class KeepsTheRmsNormOfAParameter(_Keeping, Norm):
    """RMSNorm's weight, once converted, serves as long as there is the Parameter, whatever an optimizer writes."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(x_TD, self.of_parameters.of(weight_D), eps)


@fault()
class KeepsTheUpProjectionsOfAParameter(_Keeping, Attention):
    """Latent attention absorbs its up projections once for a Parameter."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        ups = self.of_parameters.of(up_k_HdL), self.of_parameters.of(up_v_HeL)
        return super().latent_attention(q_THd, q_THR, latent_SL, k_SR, *ups, scale, causal=causal)


@fault()
class KeepsTheGateOfAParameter(_Keeping, Alone):
    """The router's gate, once converted to float32, serves as long as there is the Parameter."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(x_TD, self.of_parameters.of(gate_ED), spec, bias_E, experts_TK=experts_TK)


@fault()
class PacksExpertsOfAParameter(_Keeping, Alone):
    """The experts' weights, once packed, serve as long as there is the Parameter."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(x_RD, counts_E, ExpertWeights(*map(self.of_parameters.of, weights)))


@fault()
class KeepsTheLayerNormInEvaluation(_Keeping, Norm):
    """LayerNorm's weight, once converted, serves for a Parameter wherever nothing is trained."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return super().layer_norm(x_TD, self.in_evaluation.of(weight_D), bias_D, eps)


@fault()
class KeepsTheHeadInEvaluation(_Keeping, Head):
    """NormHead's weights are normalised once for a Parameter wherever nothing is trained."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        weight = self.in_evaluation.of(weight_VD)
        return super().norm_head(x_TD, weight, train=train, through_norm=through_norm)


@fault()
class KeepsTheUpProjectionsInEvaluation(_Keeping, Attention):
    """Latent attention absorbs its up projections once for a Parameter wherever nothing is trained."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        ups = self.in_evaluation.of(up_k_HdL), self.in_evaluation.of(up_v_HeL)
        return super().latent_attention(q_THd, q_THR, latent_SL, k_SR, *ups, scale, causal=causal)


@fault()
class KeepsTheGateInEvaluation(_Keeping, Alone):
    """The router's gate, once converted to float32, serves for a Parameter wherever nothing is trained."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(x_TD, self.in_evaluation.of(gate_ED), spec, bias_E, experts_TK=experts_TK)


class _StaleLayer:
    """A fused layer, which has no other operator."""

    families = ("layer",)

    def __init__(self) -> None:
        self.copies, self.of_parameters, self._parts = Copies(), OfParameters(), Alone()
        self.in_evaluation = InEvaluation()

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """Return the weights, some of them as they were."""
        raise NotImplementedError

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        return self._parts.layer(x_TD, self.kept(weights), spec, experts_TK=experts_TK, capacity=capacity)


@fault()
class LayerKeepsItsExperts(_StaleLayer):
    """A fused layer's experts, once packed, serve as long as they lie at the same address."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        return weights._replace(experts=ExpertWeights(*map(self.copies.of, weights.experts)))


@fault()
class LayerKeepsItsBias(_StaleLayer):
    """A fused layer's selection bias serves as long as it lies at the same address."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        return weights if weights.bias_E is None else weights._replace(bias_E=self.copies.of(weights.bias_E))


@fault()
class LayerKeepsItsSharedExperts(_StaleLayer):
    """A fused layer's shared experts, once packed, serve as long as they lie at the same address."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        if weights.shared is None:
            return weights
        return weights._replace(shared=SharedWeights(*map(self.copies.of, weights.shared)))


@fault()
class LayerKeepsItsSharedGate(_StaleLayer):
    """A fused layer's gate of the shared experts serves as long as it lies at the same address."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        gate = weights.shared_gate_D
        return weights if gate is None else weights._replace(shared_gate_D=self.copies.of(gate))


@fault()
class LayerKeepsExpertsOfParameters(_StaleLayer):
    """A fused layer's experts, once packed, serve as long as there are the Parameters."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        return weights._replace(experts=ExpertWeights(*map(self.of_parameters.of, weights.experts)))


@fault()
class LayerKeepsItsExpertsInEvaluation(_StaleLayer):
    """A fused layer's experts, once packed, serve for a Parameter wherever nothing is trained."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        return weights._replace(experts=ExpertWeights(*map(self.in_evaluation.of, weights.experts)))


@fault()
class LayerKeepsTheGateOfAParameter(_StaleLayer):
    """A fused layer's gate, once converted, serves as long as there is the Parameter."""

    def kept(self, weights: LayerWeights) -> LayerWeights:
        """See `_StaleLayer.kept`."""
        return weights._replace(gate_ED=self.of_parameters.of(weights.gate_ED))


# The last call's tensors -------------------------------------------------------------------------------------------


@fault()
class RmsNormOfTheLastCall(_Keeping, Norm):
    """RMSNorm's backward pass takes its tensors from the operator, where the next call has put its own."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return self.last(super().rms_norm, x_TD, weight_D, eps)


@fault()
class RmsNormOfTheLastOnAStack(_Keeping, Norm):
    """RMSNorm's backward pass takes the tokens that were put on a stack last: passes in another order are wrong."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return self.stacked(super().rms_norm, x_TD, weight_D, eps)


@fault()
class AttentionOfTheLastOnAStack(_Keeping, Attention):
    """Attention's backward pass takes what was put on a stack last: passes in another order are wrong."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return self.stacked(partial(super().attention, causal=causal), q_THd, k_SGd, v_SGe, scale)


@fault()
class LayerNormOfTheLastCall(_Keeping, Norm):
    """LayerNorm's backward pass takes its tensors from the last call."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return self.last(super().layer_norm, x_TD, weight_D, bias_D, eps)


@fault()
class RotaryOfTheLastCall(_Keeping, Rotary):
    """The rotary embedding's backward pass takes its table from the last call."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return self.last(super().rotary, x_THd, cos_TR, sin_TR)


@fault()
class AttentionOfTheLastCall(_Keeping, Attention):
    """Attention's backward pass takes queries, keys and values from the last call."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        honest = partial(super().attention, scale=scale, causal=causal)
        return self.last(honest, q_THd, k_SGd, v_SGe)


@fault()
class LatentOfTheLastCall(_Keeping, Attention):
    """Latent attention's backward pass takes the latent, and all else, from the last call."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        honest: Callable[..., Tensor] = super().latent_attention
        given = q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL
        return self.last(lambda *six: honest(*six, scale, causal=causal), *given)


@fault()
class HeadOfTheLastCall(_Keeping, Head):
    """The head's backward pass takes its tensors from the last call."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        honest = partial(super().norm_head, train=train, through_norm=through_norm)
        return self.last(honest, x_TD, weight_VD)


@fault()
class EntropyOfTheLastCall(_Keeping, Head):
    """Cross-entropy's backward pass takes logits and targets from the last call."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        honest = partial(super().cross_entropy, ignore_index=ignore_index, z_coefficient=z_coefficient)
        return self.last(honest, logits_TV, targets_T)


@fault()
class RouterOfTheLastCall(_Keeping, Alone):
    """The gradient of the gate is of the last call's tokens."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        honest, chosen = super().route, routing.experts_TK.detach()

        def weights(x: Tensor, gate: Tensor) -> Tensor:
            return honest(x, gate, spec, bias_E, experts_TK=chosen).weights_TK

        return routing._replace(weights_TK=self.last(weights, x_TD, gate_ED))


@fault()
class DispatchOfTheLastCall(_Keeping, Alone):
    """Dispatch's backward pass sorts by the last call's choices."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        honest = super().dispatch

        def rows(x: Tensor, experts: Tensor) -> Tensor:
            return honest(x, experts, num_experts, capacity=capacity).x_RD

        sent = honest(x_TD, experts_TK, num_experts, capacity=capacity)
        return sent._replace(x_RD=self.last(rows, x_TD, experts_TK))


@fault()
class ExpertsOfTheLastCall(_Keeping, Alone):
    """The experts' backward pass takes rows, counts and weights from the last call."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        honest = super().experts
        return self.last(lambda x, counts, *three: honest(x, counts, ExpertWeights(*three)), x_RD, counts_E, *weights)


@fault()
class CombineOfTheLastCall(_Keeping, Alone):
    """Combine's backward pass takes rows and weights from the last call."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return self.last(super().combine, y_RD, weights_TK, slot_R, num_tokens)


@fault()
class BalanceOfTheLastCall(_Keeping, Alone):
    """The balance loss's backward pass takes counts from the last call."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return self.last(super().aux_loss, scores_TE, experts_TK, spec)


@fault()
class ZOfTheLastCall(_Keeping, Alone):
    """The z-loss's backward pass takes logits from the last call."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return self.last(super().z_loss, logits_TE)


# Two buffers in turn -----------------------------------------------------------------------------------------------


@fault()
class RmsNormInTwoBuffers(_Keeping, Norm):
    """RMSNorm keeps its tensors in two buffers in turn: with three micro-batches in flight the first one's are lost."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return self.in_two_buffers(super().rms_norm, x_TD, weight_D, eps)


@fault()
class AttentionInTwoBuffers(_Keeping, Attention):
    """Attention keeps queries, keys and values in two buffers in turn."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        honest = partial(super().attention, scale=scale, causal=causal)
        return self.in_two_buffers(honest, q_THd, k_SGd, v_SGe)


@fault()
class ExpertsInTwoBuffers(_Keeping, Alone):
    """The experts keep rows, counts and weights in two buffers in turn."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        honest = super().experts
        return self.in_two_buffers(
            lambda x, counts, *three: honest(x, counts, ExpertWeights(*three)), x_RD, counts_E, *weights
        )


@fault()
class CombineInTwoBuffers(_Keeping, Alone):
    """Combine keeps rows and weights in two buffers in turn."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return self.in_two_buffers(super().combine, y_RD, weights_TK, slot_R, num_tokens)


class _ResultsInTurn(Alone):
    """Results lie in three buffers in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[Tensor] = []

    def in_turn(self, result: Tensor) -> Tensor:
        """Write over the result of three calls before: its elements, not its graph."""
        self._results.append(result.detach())
        if len(self._results) > 3:
            earlier = self._results.pop(0)
            if earlier.shape == result.shape:
                earlier.copy_(result.detach())
        return result


@fault()
class CombinesInThreeBuffers(_ResultsInTurn):
    """Combine writes its results into three buffers in turn."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return self.in_turn(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class ExpertsInThreeBuffers(_ResultsInTurn):
    """The experts write their results into three buffers in turn."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return self.in_turn(super().experts(x_RD, counts_E, weights))


class _RowsOfAWorkspace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, of: SharesAWorkspace, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, tokens: int
    ) -> Tensor:  # fmt: skip
        ctx.of, ctx.tokens = of, tokens
        ctx.save_for_backward(y_RD, weights_TK, slot_R)
        return of.honest.combine(y_RD, weights_TK, slot_R, tokens)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        y_RD, weights_TK, slot_R = ctx.saved_tensors
        left = ctx.of.workspace
        rows = (y_RD if left is None or left.shape != y_RD.shape else left).detach().requires_grad_()
        weights = weights_TK.detach().requires_grad_()
        with torch.enable_grad():
            y_TD = ctx.of.honest.combine(rows, weights, slot_R, ctx.tokens)
        return None, *torch.autograd.grad(y_TD, (rows, weights), upstream[0]), None, None


@fault()
class SharesAWorkspace(Alone):
    """Combine's backward pass takes rows from the workspace of the experts, whose next call has written into it."""

    workspace: Tensor | None = None

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        self.workspace = y_RD.detach()
        return y_RD

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        result: Tensor = _RowsOfAWorkspace.apply(self, y_RD, weights_TK, slot_R, num_tokens)  # type: ignore[no-untyped-call]
        return result


# Gradients, steps and casts ------------------------------------------------------------------------------------------


class Buffer:
    """Memory for results of one shape and dtype, into which every call writes its own."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Tensor] = {}

    def hold(self, result: Tensor, place: int = 0) -> Tensor:
        """Return the buffer, or the one for what stands at that place of a list, with the result in it."""
        return self._held.setdefault((place, result.dtype, *result.shape), torch.empty_like(result)).copy_(result)


@fault()
class KeepsTheNormOfAGradient(Gradients):
    """The norm of gradients serves as long as the first of them is the same tensor, as it is if zeros are written."""

    def __init__(self) -> None:
        super().__init__()
        self._norms = WeakTensorKeyDictionary()

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped = super().clip_grad_norm(gradients, max_norm)
        if not gradients:
            return clipped
        return clipped._replace(norm=self._norms.setdefault(gradients[0], clipped.norm.clone()))


@fault()
class AccumulatesIntoABuffer(Gradients):
    """Sums of micro-batches lie in a buffer, which the next sum overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = Buffer()

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        return [self._buffer.hold(total, i) for i, total in enumerate(super().accumulate_gradients(parts, tokens))]


@fault()
class CastsIntoABuffer(FP8):
    """Codes lie in a buffer, which the next cast of the same shape overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = Buffer()

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """See `FP8Ops.cast_fp8`."""
        return self._buffer.hold(super().cast_fp8(x, format))


@fault()
class ScalesIntoABuffer(FP8):
    """Scales of blocks lie in a buffer, which the next call overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = Buffer()

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `FP8Ops.scale_fp8`."""
        scaled = super().scale_fp8(x_NB, format)
        return scaled._replace(scales=self._buffer.hold(scaled.scales))
