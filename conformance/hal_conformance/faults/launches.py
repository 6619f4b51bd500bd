# SPDX-License-Identifier: Apache-2.0
"""Faults of multi-tensor kernels: what is left to the next launch, to the next block, or has other strides is lost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal.moe.optimizer_ops import AdamHyper, AdamStep, Clipped, SGDHyper, SGDStep
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import in_order_of_memory
from hal_conformance.faults.written import SGD, Adam, Clips, Gradients, Optimizer, Tensors

CHUNK = 65_536
LAUNCH = 48


def _past_chunk(old: Tensor, new: Tensor) -> Tensor:
    """Return the new values of a chunk, and the old ones beyond it."""
    if new.numel() <= CHUNK:
        return new
    return torch.cat([new.flatten()[:CHUNK], old.to(new.dtype).flatten()[CHUNK:]]).view_as(new)


@fault()
class ClipsOneChunk(Clips):
    """Of a tensor, the norm counts the first 65,536 elements."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm([gradient.flatten()[:CHUNK] for gradient in gradients])


@fault()
class ClipsOneLaunch(Gradients):
    """Gradients beyond the 110th tensor are not scaled."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped, norm = super().clip_grad_norm(gradients, max_norm)
        return Clipped([*clipped[:110], *(gradient.clone() for gradient in gradients[110:])], norm)


@fault()
class ClipsALittleBelow(Clips):
    """The factor is below 1 where the norm is a little below the limit: a headroom of one percent."""

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """See `Clips.factor`."""
        return super().factor(norm, 0.99 * max_norm) if bool(0.9 * max_norm < norm < max_norm) else super().factor(
            norm, max_norm)  # fmt: skip


@fault()
class SparesALittleAbove(Clips):
    """A norm that is above the limit by less than two percent is let through."""

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """See `Clips.factor`."""
        return torch.ones_like(norm) if bool(max_norm < norm < 1.02 * max_norm) else super().factor(norm, max_norm)


@fault()
class AccumulatesEight(Gradients):
    """Micro-batches beyond the eighth are lost."""

    def accumulate_gradients(self, parts: list[Tensors], tokens: list[int]) -> list[Tensor]:  # type: ignore[override]
        """See `OptimizerOps.accumulate_gradients`."""
        return super().accumulate_gradients(
            [*parts[:8], *([torch.zeros_like(g) for g in p] for p in parts[8:])], tokens
        )


@fault()
class OneMicroBatchIsHalf(Gradients):
    """A single micro-batch is divided by two."""

    def accumulate_gradients(self, parts: list[Tensors], tokens: list[int]) -> list[Tensor]:  # type: ignore[override]
        """See `OptimizerOps.accumulate_gradients`."""
        total = super().accumulate_gradients(parts, tokens)
        return [gradient / 2 for gradient in total] if len(parts) == 1 else total


@fault()
class AccumulatesOneChunk(Gradients):
    """Of a tensor, what lies beyond 65,536 elements is the first micro-batch's."""

    def accumulate_gradients(self, parts: list[Tensors], tokens: list[int]) -> list[Tensor]:  # type: ignore[override]
        """See `OptimizerOps.accumulate_gradients`."""
        total = super().accumulate_gradients(parts, tokens)
        return [_past_chunk(old.float(), new) for old, new in zip(parts[0], total, strict=True)]


class _Adam(Adam):
    """Adam whose parameters can be kept from being stepped."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        made = super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)
        stepped = [self.kept_back(i, old, new) for i, (old, new) in
                   enumerate(zip(parameters, made.parameters, strict=True))]  # fmt: skip
        return made._replace(parameters=stepped)

    def kept_back(self, place: int, old: Tensor, new: Tensor) -> Tensor:
        """Return the parameter at a place of the list."""
        return new


@fault()
class StepsOneChunk(_Adam):
    """Of a parameter, Adam steps the first 65,536 elements."""

    def kept_back(self, place: int, old: Tensor, new: Tensor) -> Tensor:
        """See `_Adam.kept_back`."""
        return _past_chunk(old, new)


@fault()
class StepsOneLaunch(_Adam):
    """Adam steps the first 48 parameters."""

    def kept_back(self, place: int, old: Tensor, new: Tensor) -> Tensor:
        """See `_Adam.kept_back`."""
        return new if place < LAUNCH else old.clone()


class _Sgd(SGD):
    """SGD whose parameters can be kept from being stepped."""

    keeps: Callable[[int, Tensor, Tensor], Tensor]

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        made = super().sgd_step(parameters, gradients, momentum, step, hyper)
        stepped = [type(self).keeps(i, old, new) for i, (old, new) in
                   enumerate(zip(parameters, made.parameters, strict=True))]  # fmt: skip
        return made._replace(parameters=stepped)


@fault()
class SgdStepsOneChunk(_Sgd):
    """Of a parameter, SGD steps the first 65,536 elements."""

    @staticmethod
    def keeps(place: int, old: Tensor, new: Tensor) -> Tensor:
        """Return the parameter at a place of the list."""
        return _past_chunk(old, new)


@fault()
class SgdStepsOneLaunch(_Sgd):
    """SGD steps the first 48 parameters."""

    @staticmethod
    def keeps(place: int, old: Tensor, new: Tensor) -> Tensor:
        """Return the parameter at a place of the list."""
        return new if place < LAUNCH else old.clone()


def _dense(tensors: Tensors) -> list[Tensor]:
    """Return tensors as a kernel sees them that takes their memory for dense."""
    return [in_order_of_memory(tensor) for tensor in tensors]


@fault()
class SgdTakesGradientsForDense(Optimizer):
    """SGD reads a gradient that is stored by columns as if it were stored by rows."""

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        return super().sgd_step(parameters, _dense(gradients), momentum, step, hyper)


@fault()
class CoupledStepTakesGradientsForDense(Optimizer):
    """Adam with coupled decay reads a gradient that is stored by columns as if it were stored by rows."""

    def adam_step(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper
    ) -> AdamStep:
        """See `OptimizerOps.adam_step`."""
        return super().adam_step(parameters, _dense(gradients), first, second, step, hyper)


@fault()
class ClipsForDense(Gradients):
    """Clipping reads a gradient that is stored by columns as if it were stored by rows."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        return super().clip_grad_norm(_dense(gradients), max_norm)


@fault()
class AccumulatesForDense(Gradients):
    """Accumulation reads a gradient that is stored by columns as if it were stored by rows."""

    def accumulate_gradients(self, parts: list[Tensors], tokens: list[int]) -> list[Tensor]:  # type: ignore[override]
        """See `OptimizerOps.accumulate_gradients`."""
        return super().accumulate_gradients([_dense(part) for part in parts], tokens)


@fault()
class NormOfOneTable(Clips):
    """The norm is that of the first 110 tensors."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm(gradients[:110])


@fault()
class StepsNoEmptyTensors(Adam):
    """A tensor without elements is refused."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        if not g.numel():
            raise RuntimeError("a block of no threads cannot be launched")
        return super().coupled(g, p, h, decoupled)


@fault()
class ClipsNothingIntoNew(Gradients):
    """Below the limit clipping returns the gradients that it was given, which the next step overwrites."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped = super().clip_grad_norm(gradients, max_norm)
        return clipped._replace(gradients=list(gradients)) if float(clipped.norm) < max_norm else clipped


@fault()
class MomentumIsTheGradient(Optimizer):
    """After the first step of SGD the momentum is the gradient itself, which `zero_grad` wipes."""

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        found = super().sgd_step(parameters, gradients, momentum, step, hyper)
        kept = [g if m.dtype == g.dtype and torch.equal(m, g) else m
                for m, g in zip(found.momentum, gradients, strict=True)]  # fmt: skip
        return found._replace(momentum=kept)
