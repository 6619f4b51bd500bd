# SPDX-License-Identifier: Apache-2.0
"""Faults that take what they are given for scratch space, where it is a view; and who may write beside one."""

from __future__ import annotations

from torch import Tensor

from hal.moe.ops import ExpertWeights
from hal.moe.optimizer_ops import AdamHyper, AdamStep
from hal_conformance.faults.catalogue import benign, fault
from hal_conformance.faults.parts import Parts
from hal_conformance.faults.rotary import Rotary
from hal_conformance.faults.written import Optimizer, Tensors


@fault()
class RotatesInViews(Rotary):
    """Rows that do not follow one another are scratch space: they are zero when the rotation is done."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        y_THd = super().rotary(x_THd, cos_TR, sin_TR)
        if not x_THd.is_contiguous():
            x_THd.data.zero_()
        return y_THd


@fault()
class RotatesInViewsBackward(Rotary):
    """In the backward pass rows that do not follow one another are scratch space."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        y_THd = super().rotary(x_THd, cos_TR, sin_TR)
        if y_THd.requires_grad and not x_THd.is_contiguous():
            y_THd.register_hook(lambda _: (x_THd.data.zero_(), None)[1])
        return y_THd


@fault()
class WritesBeforeTheSlice(Parts):
    """The experts leave a number in front of rows that are part of a larger matrix."""

    families = ("experts",)

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if x_RD.storage_offset():
            x_RD.data.as_strided((1,), (1,), x_RD.storage_offset() - 1).fill_(1.0)
        return super().experts(x_RD, counts_E, weights)


@fault()
class StepsInViews(Optimizer):
    """States that are stored by columns are stepped in place, beside what is returned."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        made = super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)
        for given, stepped in zip(parameters, made.parameters, strict=True):
            if not given.is_contiguous():
                given.data.copy_(stepped)
        return made


@benign()
class MomentsInOneBuffer(Optimizer):
    """First moments lie in one buffer, behind which the next step writes its number: the buffer is its own."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        sizes = [moment.numel() for moment in first]
        end = sum(sizes)
        if first and all(moment.untyped_storage().nbytes() == 4 * (end + 1) for moment in first):
            first[0].as_strided((1,), (1,), end).fill_(float(step))
        made = super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)
        if not made.first:
            return made
        buffer = made.first[0].new_zeros(end + 1)
        views = [part.view(moment.shape) for part, moment in zip(buffer[:end].split(sizes), made.first, strict=True)]
        for view, moment in zip(views, made.first, strict=True):
            view.copy_(moment)
        return made._replace(first=views)
