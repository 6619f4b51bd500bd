# SPDX-License-Identifier: Apache-2.0
"""Faults of operators where a width is no multiple of 8: what whole vectors of channels leave over is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts

VECTOR = 8


def _whole(rows: Tensor) -> Tensor:
    """Return the rows, zero beyond the last whole vector of channels."""
    width = rows.shape[-1]
    keep = torch.arange(width, device=rows.device) < width - width % VECTOR
    return torch.where(keep, rows, torch.zeros_like(rows))


@fault()
class LosesUnalignedK(Alone):
    """The products of gate and up projection miss the channels that 8 leaves over."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(_whole(x_RD), counts_E, weights)


@fault()
class LosesUnalignedHidden(Alone):
    """The down projection misses the hidden units that 8 leaves over."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(x_RD, counts_E, weights._replace(w2_EDF=_whole(weights.w2_EDF)))


@fault()
class LosesUnalignedGradients(Alone):
    """The gradients of rows and of up projections are zero in the channels that 8 leaves over."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        x_RD, w3_EFD = (by_hand(torch.clone, lambda d, _: _whole(d), t) for t in (x_RD, weights.w3_EFD))
        return super().experts(x_RD, counts_E, weights._replace(w3_EFD=w3_EFD))


@fault()
class RefusesOddWidths(Alone):
    """The experts fail where a width is odd."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if x_RD.shape[1] % 2 or weights.w1_EFD.shape[1] % 2:
            raise RuntimeError("misaligned address")
        return super().experts(x_RD, counts_E, weights)


@fault()
class RoutesByWholeVectors(Alone):
    """The gate's product misses the channels that 8 leaves over."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(_whole(x_TD), gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchesWholeVectors(Alone):
    """Dispatched rows are zero in the channels that 8 leaves over."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=_whole(out.x_RD))


@fault()
class CombinesWholeVectors(Alone):
    """Combined tokens are zero in the channels that 8 leaves over."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return _whole(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class LayersOfWholeVectors(Parts):
    """A layer's output is zero in the channels that 8 leaves over."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        return out._replace(y_TD=_whole(out.y_TD))
