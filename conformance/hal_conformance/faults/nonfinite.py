# SPDX-License-Identifier: Apache-2.0
"""Faults with what is not finite: hidden from the caller, or spread to where it does not belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.clamping import with_clamped_gradient
from hal_conformance.faults.layer import AfterLayer
from hal_conformance.faults.parts import Parts


@fault()
class ClampsInfinities(Parts):
    """The experts return the largest finite number for an infinity."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        return y_RD.nan_to_num(nan=torch.nan)


@fault()
class ZeroesInfiniteRows(Parts):
    """The experts return zero for a row with an infinity."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(x_RD, counts_E, weights).masked_fill(x_RD.isinf().any(1, keepdim=True), 0)


@fault()
class ZeroesInfiniteTokens(AfterLayer):
    """The layer returns zero for a token with an infinity."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        return out._replace(y_TD=out.y_TD.masked_fill(x_TD.isinf().any(1, keepdim=True), 0))


class _OverExperts(torch.autograd.Function):
    """The weights; their gradient as a sum over all experts times a mask gives it: 0 times NaN is NaN."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 0 * gradient.sum(0)


@fault()
class NanInAllExperts(Parts):
    """A NaN among the gradients of one expert's weights makes those of all experts NaN."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w1, w3, w2 = (_OverExperts.apply(w) for w in weights)  # type: ignore[no-untyped-call]
        return super().experts(x_RD, counts_E, ExpertWeights(w1, w3, w2))


@fault()
class HidesNanUpstream(Parts):
    """A NaN in the upstream gradient of the experts is taken for zero."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        if y_RD.requires_grad:
            y_RD.register_hook(lambda gradient: gradient.nan_to_num(nan=0.0))
        return y_RD


@fault()
class SaturatesGradientsOfRows(Parts):
    """Gradients of the experts' rows that overflow become the largest finite number."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(with_clamped_gradient(x_RD), counts_E, weights)


class _SaturatesOneWeight(Parts):
    """Gradients of one matrix of the experts that overflow become the largest finite number."""

    matrix = "w1_EFD"

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        matrix = with_clamped_gradient(getattr(weights, self.matrix))
        return super().experts(x_RD, counts_E, weights._replace(**{self.matrix: matrix}))


@fault()
class SaturatesGradientsOfW1(_SaturatesOneWeight):
    """Gradients of the gate projections that overflow become the largest finite number."""


@fault()
class SaturatesGradientsOfW3(_SaturatesOneWeight):
    """Gradients of the up projections that overflow become the largest finite number."""

    matrix = "w3_EFD"


@fault()
class SaturatesGradientsOfW2(_SaturatesOneWeight):
    """Gradients of the down projections that overflow become the largest finite number."""

    matrix = "w2_EDF"


@fault()
class ClampsUpstreamOfCombine(Parts):
    """An infinity in the upstream gradient of combine is taken for the largest finite number."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return with_clamped_gradient(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class ClampsUpstreamOfDispatch(Parts):
    """An infinity in the upstream gradient of dispatch is taken for the largest finite number."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=with_clamped_gradient(out.x_RD))
