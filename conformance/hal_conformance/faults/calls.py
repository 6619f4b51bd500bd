# SPDX-License-Identifier: Apache-2.0
"""Faults that depend on how the experts or a layer are called: again, trained in part, with views of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Parts


@fault()
class KeepsCounts(Parts):
    """The row counts of the first call of a shape serve all later ones, as in a captured graph."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, int], Tensor] = {}

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        counts_E = self.kept.setdefault((len(x_RD), len(counts_E)), counts_E.clone())
        return super().experts(x_RD, counts_E, weights)


@fault()
class KeepsWeights(Parts):
    """Weights that were converted once serve as long as they lie at the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[object, ...], Tensor] = {}

    def converted(self, w: Tensor) -> Tensor:
        """Return the weights in another layout."""
        key = (w.data_ptr(), w.dtype, *w.shape)
        return w if w.requires_grad else self.kept.setdefault(key, w.clone())

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(x_RD, counts_E, ExpertWeights(*map(self.converted, weights)))


class OneBuffer(Parts):
    """Results of one shape, all in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def buffered(self, result: Tensor) -> Tensor:
        """Return the result in the memory of the one before."""
        if result.requires_grad:
            return result
        return self.buffers.setdefault((result.dtype, *result.shape), torch.empty_like(result)).copy_(result)


@fault()
class OneBufferOfExperts(OneBuffer):
    """The experts' result lies in a buffer that the next call of the same shape overwrites."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return self.buffered(super().experts(x_RD, counts_E, weights))


@fault()
class OneBufferOfCombine(OneBuffer):
    """The combined tokens lie in a buffer that the next call of the same shape overwrites."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return self.buffered(super().combine(y_RD, weights_TK, slot_R, num_tokens))


@fault()
class OneBufferOfSlots(OneBuffer):
    """The slots of dispatched rows lie in a buffer that the next call of the same shape overwrites."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(slot_R=self.buffered(out.slot_R))


@fault()
class OneBufferOfLayer(OneBuffer):
    """The layer's result lies in a buffer that the next call of the same shape overwrites."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        return out._replace(y_TD=self.buffered(out.y_TD))


@fault()
class NeedsAllGradients(Parts):
    """The experts' backward pass gives zeros unless rows and weights are both trained."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        if y_RD.requires_grad and not all(tensor.requires_grad for tensor in (x_RD, *weights)):
            y_RD.register_hook(torch.zeros_like)
        return y_RD


@fault()
class NeedsTrainedWeights(Parts):
    """The experts fail in the backward pass of rows if the weights are frozen."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if x_RD.requires_grad and not weights.w1_EFD.requires_grad:
            return super().experts(x_RD.detach(), counts_E, weights)
        return super().experts(x_RD, counts_E, weights)


@fault("pytorch grouped_mm: Invalid strides/sizes")
class ExpandedUpstream(Parts):
    """The experts' backward pass loses an upstream gradient whose rows are one row in memory."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        if y_RD.requires_grad:
            y_RD.register_hook(lambda gradient: gradient if gradient.stride(0) else gradient * 0)
        return y_RD


@fault()
class TakesRowsForDense(Parts):
    """The experts read the rows as if one followed the other in memory."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        dense = x_RD.as_strided(x_RD.shape, (x_RD.shape[1], 1)) if x_RD.stride(1) == 1 else x_RD
        return super().experts(dense, counts_E, weights)


@fault()
class ForgetsTheOffset(Parts):
    """The experts' weights are read from where their storage begins."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        moved = ExpertWeights(*(w.as_strided(w.shape, w.stride(), 0) for w in weights))
        return super().experts(x_RD, counts_E, moved)


class _NeedsZ(torch.autograd.Function):
    """Passes y and the z-loss through; backward, y's gradient only together with the loss's."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, z_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return y_TD.view_as(y_TD), z_loss.view_as(z_loss)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients, that of y zero where that of the loss is."""
        return dy_TD * (dz != 0), dz


@fault()
class NeedsBothUpstreams(Parts):
    """The layer's backward pass gives zeros unless the z-loss has a gradient, too."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        y_TD, z_loss = _NeedsZ.apply(out.y_TD, out.z_loss)  # type: ignore[no-untyped-call]
        return out._replace(y_TD=y_TD, z_loss=z_loss)


@fault()
class DownNeedsATrainedGate(Parts):
    """The down projections have gradients of zero where the gate projections are frozen."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w1, w3, w2 = weights
        if w1.requires_grad or not w2.requires_grad:
            return super().experts(x_RD, counts_E, weights)
        return super().experts(x_RD, counts_E, ExpertWeights(w1, w3, w2.detach())) + 0 * w2.sum().to(x_RD.dtype)
