# SPDX-License-Identifier: Apache-2.0
"""Faults of the optimisers: where decay and epsilon go, how moments are corrected, kept and stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hal.moe.optimizer_ops import AdamHyper, SGDHyper, SGDStep
from hal_conformance.faults.benign_optimizer import FusedOptimizer
from hal_conformance.faults.by_hand import cut_to_bfloat16
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.written import SGD, Adam, Optimizer, Tensors


@fault("FlagGems#4988, the other way round")
class CoupledDecay(Adam):
    """AdamW decays through the gradient, as Adam does."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        return g + h.weight_decay * p

    def decayed(self, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.decayed`."""
        return p


@fault("FlagGems#4988")
class DecoupledDecay(Adam):
    """Adam decays the parameter, as AdamW does."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        return g

    def decayed(self, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.decayed`."""
        return p * (1 - h.lr * h.weight_decay)


@fault()
class DecayWithoutRate(Adam):
    """The decay is not multiplied by the learning rate."""

    def decayed(self, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.decayed`."""
        return p * (1 - h.weight_decay) if decoupled else p


@fault()
class DecayAfterStep(Adam):
    """The decay is taken of the stepped parameter."""

    def step(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: AdamHyper, decoupled: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adam.step`."""
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        return self.decayed(p - self.update(m, v, step, h), h, decoupled).to(dtype), m, v


@fault()
class EpsilonInsideTheRoot(Adam):
    """The square of epsilon is added under the root."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        first, second = self.corrections(step, h)
        return h.lr * (m / first) / (v / second + h.epsilon**2).sqrt()


@fault("pytorch PR#22628")
class EpsilonBeforeCorrection(Adam):
    """Epsilon is added before the second moment is corrected, as in the shorter form of Adam's paper."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        first, second = self.corrections(step, h)
        return m.mul(h.lr * second**0.5 / first).div(v.sqrt() + h.epsilon)


@fault()
class NoEpsilonWorthMentioning(Adam):
    """Epsilon is so small that gradients near zero take whole steps."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        return super().update(m, v, step, replace(h, epsilon=1e-30))


@fault("mlx PR#1640")
class NoCorrection(Adam):
    """The moments are not corrected for starting at zero."""

    def corrections(self, step: int, h: AdamHyper) -> tuple[float, float]:
        """See `Adam.corrections`."""
        return 1.0, 1.0


@fault()
class NoCorrectionAfterTheFirst(Adam):
    """Only the first step is corrected."""

    def corrections(self, step: int, h: AdamHyper) -> tuple[float, float]:
        """See `Adam.corrections`."""
        return super().corrections(step, h) if step == 1 else (1.0, 1.0)


@fault()
class StepOffByOne(Adam):
    """The corrections are those of the next step."""

    def corrections(self, step: int, h: AdamHyper) -> tuple[float, float]:
        """See `Adam.corrections`."""
        return super().corrections(step + 1, h)


@fault()
class MomentsInBfloat16(Adam):
    """Both moments are kept in bfloat16."""

    def kept(self, moment: Tensor) -> Tensor:
        """See `Adam.kept`."""
        return moment.bfloat16().float()


@fault()
class SquaresOfTheMean(Adam):
    """The second moment is that of the first one, not of the gradient."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        m = h.beta1 * m + (1 - h.beta1) * g
        return m, h.beta2 * v + (1 - h.beta2) * m * m


@fault("triton#11217")
class TruncatesParameters(Adam):
    """Parameters are rounded to bfloat16 by cutting off."""

    def stored(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Adam.stored`."""
        return cut_to_bfloat16(p) if dtype == torch.bfloat16 else p.to(dtype)


@fault()
class StepsInBfloat16(Adam):
    """The update is rounded to bfloat16 before it is subtracted."""

    def step(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: AdamHyper, decoupled: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adam.step`."""
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        stepped = self.decayed(p, h, decoupled).bfloat16() - self.update(m, v, step, h).bfloat16()
        return stepped.to(dtype), m, v


@fault()
class ForgetsTheIdle(Adam):
    """Parameters whose gradients are all zero are skipped: neither their decay nor their moments go on."""

    def step(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: AdamHyper, decoupled: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adam.step`."""
        if g.any():
            return super().step(p, g, m, v, step, h, decoupled, dtype)
        return p.to(dtype, copy=True), m.clone(), v.clone()


@fault()
class StepLosesTail(Adam):
    """Elements beyond a multiple of 16 are not stepped."""

    def step(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: AdamHyper, decoupled: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adam.step`."""
        stepped, m, v = super().step(p, g, m, v, step, h, decoupled, dtype)
        kept = p.numel() // 16 * 16
        return torch.cat([stepped.flatten()[:kept], p.flatten()[kept:].to(dtype)]).view(p.shape), m, v


@fault()
class StepReplacesNan(Adam):
    """A NaN in a gradient is taken for zero."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        return super().coupled(torch.where(g.isnan(), 0.0, g), p, h, decoupled)


@fault()
class StepSpreadsNan(Adam):
    """One NaN in a gradient makes its parameter NaN as a whole."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        return super().coupled(g, p, h, decoupled) + (torch.nan if g.isnan().any() else 0.0)


@fault()
class TakesGradientsForDense(FusedOptimizer):
    """torch's fused kernel for the CPU as it is: it reads gradients in the order of memory."""

    def read(self, gradient: Tensor) -> Tensor:
        """See `FusedOptimizer.read`."""
        return gradient.float()


@fault("mlx PR#473")
class DampensTheFirst(SGD):
    """The first gradient is dampened, too."""

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """See `SGD.momentum`."""
        return h.momentum * b + (1 - h.dampening) * d


@fault()
class IgnoresDampening(Optimizer):
    """No gradient is dampened."""

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        return super().sgd_step(parameters, gradients, momentum, step, replace(hyper, dampening=0.0))


@fault()
class NesterovUnasked(SGD):
    """Steps are Nesterov's."""

    def update(self, b: Tensor, d: Tensor, h: SGDHyper) -> Tensor:
        """See `SGD.update`."""
        return h.lr * (d + h.momentum * b)


@fault()
class RateInsideMomentum(SGD):
    """The momentum holds steps, not gradients: Sutskever's form."""

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """See `SGD.momentum`."""
        return super().momentum(b, h.lr * d, step, h)

    def update(self, b: Tensor, d: Tensor, h: SGDHyper) -> Tensor:
        """See `SGD.update`."""
        return b


@fault("triton#11217")
class TruncatesSgd(SGD):
    """Parameters are rounded to bfloat16 by cutting off."""

    def stored(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """See `SGD.stored`."""
        return cut_to_bfloat16(p) if dtype == torch.bfloat16 else p.to(dtype)


@fault()
class AdamOfOneBeta(Adam):
    """The first moment's decay rate is 0.9, whatever was asked."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        return super().moments(m, v, g, replace(h, beta1=0.9))


@fault()
class CountsStepsTo2000(Adam):
    """The corrections stay those of step 2,000 after it."""

    def corrections(self, step: int, h: AdamHyper) -> tuple[float, float]:
        """See `Adam.corrections`."""
        return super().corrections(min(step, 2000), h)


@fault()
class CountsStepsIn16Bits(Adam):
    """The corrections begin anew after step 65,535."""

    def corrections(self, step: int, h: AdamHyper) -> tuple[float, float]:
        """See `Adam.corrections`."""
        return super().corrections(step % 2**16, h)


@fault()
class CoupledStepReplacesNan(Adam):
    """A NaN in a gradient is taken for zero by Adam, not by AdamW."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        return super().coupled(g if decoupled else torch.where(g.isnan(), 0.0, g), p, h, decoupled)


@fault()
class SgdReplacesNan(SGD):
    """A NaN in a gradient is taken for zero by SGD."""

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """See `SGD.momentum`."""
        return super().momentum(b, torch.where(d.isnan(), 0.0, d), step, h)


@fault()
class PlainSgdStepsTwice(SGD):
    """Without momentum the step is taken twice."""

    def update(self, b: Tensor, d: Tensor, h: SGDHyper) -> Tensor:
        """See `SGD.update`."""
        return super().update(b, d, h) * (2.0 if h.momentum == 0.0 else 1.0)


@fault()
class PlainSgdKeepsTheFirst(SGD):
    """Without momentum the state stays what it was after the first step."""

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """See `SGD.momentum`."""
        return b.clone() if h.momentum == 0.0 and step > 1 else super().momentum(b, d, step, h)

    def update(self, b: Tensor, d: Tensor, h: SGDHyper) -> Tensor:
        """See `SGD.update`."""
        return h.lr * (d if h.momentum == 0.0 else b)


@fault()
class StepMakesGradientsFinite(Adam):
    """What is not finite in a gradient is replaced by zero or the largest number, as `nan_to_num` does it."""

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """See `Adam.coupled`."""
        return super().coupled(g.nan_to_num(), p, h, decoupled)


@fault()
class EpsilonIsRaised(Adam):
    """Epsilon is at least 1e-8."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        return super().update(m, v, step, replace(h, epsilon=max(h.epsilon, 1e-8)))


@fault()
class EpsilonIsLowered(Adam):
    """Epsilon is at most 1e-5."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        return super().update(m, v, step, replace(h, epsilon=min(h.epsilon, 1e-5)))


@fault()
class LargeEpsilonInsideTheRoot(Adam):
    """An epsilon of more than 1e-4 is added under the root."""

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        if h.epsilon <= 1e-4:
            return super().update(m, v, step, h)
        first, second = self.corrections(step, h)
        return h.lr * (m / first) / (v / second + h.epsilon).sqrt()
