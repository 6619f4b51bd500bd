# SPDX-License-Identifier: Apache-2.0
"""Faults of optimisers and clipping that need other hyperparameters, dtypes, axes or lists than most models give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hal.moe.optimizer_ops import AdamHyper, AdamStep, Clipped, SGDHyper, SGDStep
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.written import SGD, Adam, Clips, Gradients, Optimizer, Tensors


@fault()
class TakesNoRateForTheDefault(Optimizer):
    """A learning rate of zero is taken for none, and the default is in its place."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        hyper = replace(hyper, lr=hyper.lr or 1e-3)
        return super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)


@fault()
class PlainTakesNoRateForTheDefault(Optimizer):
    """SGD takes a learning rate of zero for none, and the default is in its place."""

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        return super().sgd_step(parameters, gradients, momentum, step, replace(hyper, lr=hyper.lr or 1e-3))


@fault()
class RateIsLimited(Adam):
    """The learning rate is at most 0.05."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        return super().update(m, v, step, replace(h, lr=min(h.lr, 0.05)))


@fault()
class TakesNoBetaForTheDefault(Adam):
    """A first beta of zero is taken for none, and the default is in its place."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        return super().moments(m, v, g, replace(h, beta1=h.beta1 or 0.9))


@fault()
class TakesNoSecondBetaForTheDefault(Adam):
    """A second beta of zero is taken for none, and the default is in its place."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        return super().moments(m, v, g, replace(h, beta2=h.beta2 or 0.999))


@fault()
class SecondBetaIsRaised(Optimizer):
    """The second beta is at least 0.9."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        hyper = replace(hyper, beta2=max(hyper.beta2, 0.9))
        return super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)


@fault()
class PlainSgdForgetsDecay(Optimizer):
    """Without momentum nothing decays."""

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        decay = hyper.weight_decay if hyper.momentum else 0.0
        return super().sgd_step(parameters, gradients, momentum, step, replace(hyper, weight_decay=decay))


@fault()
class PlainSgdDampens(SGD):
    """Gradients are dampened without momentum, too."""

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """See `SGD.momentum`."""
        return d if step == 1 else h.momentum * b + (1 - h.dampening) * d


@fault()
class GradientsOfTheParametersDtype(Optimizer):
    """A gradient in float32 is rounded to its parameter's bfloat16 first."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        gradients = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        return super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)


@fault()
class StepsInTheFirstDtype(Optimizer):
    """All parameters come back in the first one's dtype."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        made = super()._adam(parameters, gradients, first, second, step, hyper, decoupled=decoupled)
        return made._replace(parameters=[p.to(parameters[0].dtype) for p in made.parameters])


@fault()
class StepsInTheFirstPrecision(Optimizer):
    """All parameters are rounded as the first one is, and come back in their own dtype."""

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        made = super().sgd_step(parameters, gradients, momentum, step, hyper)
        return made._replace(parameters=[p.to(parameters[0].dtype).to(p.dtype) for p in made.parameters])


@fault()
class StepsNoScalars(Adam):
    """A parameter without axes stays as it is."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        return super().update(m, v, step, h) * bool(m.dim())


@fault()
class ClipsNoScalars(Clips):
    """A gradient without axes is left out of the norm."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm([gradient for gradient in gradients if gradient.dim()])


@fault()
class ClipsUpToThreeAxes(Gradients):
    """A gradient of more than three axes is not scaled."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped, norm = super().clip_grad_norm(gradients, max_norm)
        return Clipped([g.clone() if g.dim() > 3 else c for c, g in zip(clipped, gradients, strict=True)], norm)


@fault()
class ClipsInTheFirstDtype(Gradients):
    """All gradients come back in the first one's dtype."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped, norm = super().clip_grad_norm(gradients, max_norm)
        return Clipped([g.to(gradients[0].dtype) for g in clipped], norm)


@fault()
class ClipsToInfinity(Clips):
    """A limit of infinity makes gradients NaN."""

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """See `Clips.factor`."""
        return super().factor(norm, max_norm) + 0.0 * max_norm


@fault()
class ClipsNoEmptyList(Gradients):
    """The device is that of the first gradient, though there be none."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped, norm = super().clip_grad_norm(gradients, max_norm)
        return Clipped(clipped, norm.to(gradients[0].device))


@fault()
class AccumulatesInTheFirstDtype(Gradients):
    """All gradients are rounded as the first one is before they are added up."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        return super().accumulate_gradients([[g.to(some[0].dtype) for g in some] for some in parts], tokens)


@fault()
class CountsTokensIn16Bits(Gradients):
    """A micro-batch of 65,536 tokens or more counts as many less."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        return super().accumulate_gradients(parts, [number % 2**16 for number in tokens])


@fault()
class CountsTokensIn15Bits(Gradients):
    """A micro-batch of more than 32,767 tokens counts as one of so many."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        return super().accumulate_gradients(parts, [min(number, 2**15 - 1) for number in tokens])
