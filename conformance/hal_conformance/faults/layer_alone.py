# SPDX-License-Identifier: Apache-2.0
"""Faults of fused layers: of their operators there is nothing to see, since they have none but `layer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, LayerOutput
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.combine import CombinesInBfloat16
from hal_conformance.faults.dispatch import CapacityZeroIsNone
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
