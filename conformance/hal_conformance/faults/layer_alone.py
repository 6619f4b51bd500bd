# SPDX-License-Identifier: Apache-2.0
"""Faults of fused layers: of their operators there is nothing to see, since they have none but `layer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, LayerOutput, LayerWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.clamping import with_clamped_gradient
from hal_conformance.faults.combine import CombinesInBfloat16
from hal_conformance.faults.dispatch import CapacityZeroIsNone
from hal_conformance.faults.frozen import lost_unless
from hal_conformance.faults.layer import AfterLayer
from hal_conformance.faults.nonfinite import NanInAllExperts
from hal_conformance.faults.parts import Parts, gradient_of
from hal_conformance.faults.products import AccumulatesInBfloat16
from hal_conformance.faults.router import DropsEpsilon, HigherIndexFirst, MasksWithZero
from hal_conformance.faults.training import AccumulatesGradientsLow


class LayerAlone:
    """A layer of parts that cannot be called."""

    parts: type[Parts]

    def __init__(self) -> None:
        self._inner = self.parts()

    def layer(self, *given: Any, **named: Any) -> LayerOutput:
        """See `MoEOps.layer`."""
        return self._inner.layer(*given, **named)


@fault()
class LayerHigherIndexFirst(LayerAlone):
    """A fused layer in which ties go to the higher expert index."""

    parts = HigherIndexFirst


@fault("vllm PR#13474")
class LayerMasksWithZero(LayerAlone):
    """A fused layer in which experts of groups that are not chosen score 0.0 instead of -inf."""

    parts = MasksWithZero


@fault()
class LayerCapacityZeroIsNone(LayerAlone):
    """A fused layer that takes a capacity of zero for none."""

    parts = CapacityZeroIsNone


@fault()
class LayerDropsEpsilon(LayerAlone):
    """A fused layer that normalises without the epsilon."""

    parts = DropsEpsilon


@fault()
class LayerCombinesInBfloat16(LayerAlone):
    """A fused layer that adds up the choices in bfloat16."""

    parts = CombinesInBfloat16


@fault()
class LayerAccumulatesInBfloat16(LayerAlone):
    """A fused layer whose experts' products are added up in bfloat16, in blocks of 16."""

    parts = AccumulatesInBfloat16


class _TruncatedSum(Parts):
    """Parts whose shared output is added by cutting off."""

    def output(
        self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, shared_TD: Tensor | None, num_tokens: int
    ) -> Tensor:
        """See `Parts.output`."""
        y_TD = super().output(y_RD, weights_TK, slot_R, shared_TD, num_tokens)
        if shared_TD is None or y_TD.dtype == torch.float32:
            return y_TD
        exact = self.combine(y_RD, weights_TK, slot_R, num_tokens).detach().float() + shared_TD.detach().float()
        near = exact.to(y_TD.dtype)
        cut = torch.where(near.float().abs() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)
        return gradient_of(cut, y_TD)


@fault("triton#11217")
class LayerTruncatesTheSum(LayerAlone):
    """A fused layer that adds the shared output to the routed one by cutting off to 16 bits."""

    parts = _TruncatedSum


class _LowDispatch(Parts):
    """Parts whose token gradients are added up in the tokens' dtype."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        sent = super().dispatch(x_TD.detach(), experts_TK, num_experts, capacity=capacity)
        return sent._replace(x_RD=x_TD[sent.slot_R // max(1, experts_TK.shape[1])])


@fault()
class LayerSumsGradientsLow(LayerAlone):
    """A fused layer that adds up a token's gradients over its choices in 16 bits."""

    parts = _LowDispatch


@fault()
class LayerAccumulatesGradientsLow(LayerAlone):
    """A fused layer whose weight gradients are accumulated over blocks of four rows in the dtype of the weights."""

    parts = AccumulatesGradientsLow


@fault()
class LayerNanInAllExperts(LayerAlone):
    """A fused layer in which a NaN among one expert's weight gradients makes those of all NaN."""

    parts = NanInAllExperts


class _TwiceAlone(AfterLayer):
    """A layer whose result is added twice where there is one token."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        return out._replace(y_TD=out.y_TD * 2) if len(x_TD) == 1 else out


@fault()
class LayerDoublesAToken(LayerAlone):
    """A fused layer that reduces twice where there is a single token."""

    parts = _TwiceAlone


class _LosesAlignedTokens(AfterLayer):
    """A layer whose last token is lost where their number is a multiple of 32."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        if len(x_TD) % 32:
            return out
        keep = torch.ones(len(x_TD), 1, dtype=x_TD.dtype, device=x_TD.device)
        keep[-1] = 0
        return out._replace(y_TD=out.y_TD * keep)


@fault()
class LayerLosesAlignedTokens(LayerAlone):
    """A fused layer that loses the last token where their number is a multiple of 32."""

    parts = _LosesAlignedTokens


class _SaturatesTokens(Parts):
    """A layer whose token gradients that overflow become the largest finite number."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        return super().layer(with_clamped_gradient(x_TD), weights, spec, experts_TK=experts_TK, capacity=capacity)


@fault()
class LayerSaturatesGradients(LayerAlone):
    """A fused layer that returns the largest finite number for a token's gradient that overflows."""

    parts = _SaturatesTokens


class _NeedsATrainedGate(Parts):
    """Parts whose router passes on no gradient of the tokens if the gate is frozen."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        x_TD = x_TD if gate_ED.requires_grad else x_TD.detach()
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class LayerNeedsATrainedGate(LayerAlone):
    """A fused layer whose token gradients lack the router's part if the gate is frozen."""

    parts = _NeedsATrainedGate


class _NeedsTrainedTokens(Parts):
    """A layer whose gate has no gradient of its own unless the tokens have one."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        weights = weights._replace(gate_ED=lost_unless(x_TD.requires_grad, weights.gate_ED))
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)


@fault()
class LayerNeedsTrainedTokens(LayerAlone):
    """A fused layer whose gate gets a gradient of zero unless the tokens are trained."""

    parts = _NeedsTrainedTokens
