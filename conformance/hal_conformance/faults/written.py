# SPDX-License-Identifier: Apache-2.0
"""Clipping, Adam and SGD as they are written down, cut so that one step of them can be changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hal.moe.optimizer_ops import CLIP_EPSILON, AdamHyper, AdamStep, Clipped, SGDHyper, SGDStep
from hal.moe.torch_ops import torch_ops
from hal.moe.torch_optimizer_ops import TorchOptimizerOps

Tensors = Sequence[Tensor]


class Gradients(TorchOptimizerOps):
    """The portable operators, of which clipping and accumulation can be changed; the experts are those of `hal.moe`."""

    families: tuple[str, ...] = ("gradients",)
    experts = staticmethod(torch_ops.experts)


class Clips(Gradients):
    """Clipping from its two steps."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        if not gradients:
            return Clipped([], torch.zeros(()))
        wide = [gradient.float() for gradient in gradients]
        norm = self.norm(wide)
        factor = self.factor(norm, max_norm)
        return Clipped([(w * factor).to(g.dtype) for w, g in zip(wide, gradients, strict=True)], norm)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of all gradients, which are in float32."""
        total: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        return total

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """Return what gradients are multiplied by."""
        return (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)


class Optimizer(TorchOptimizerOps):
    """The portable operators, of which the optimisers can be changed."""

    families = ("optimizer",)


class Adam(Optimizer):
    """Adam and AdamW from their steps, in float32 or wider.

    Legend: p parameter, g gradient, m and v its moments, h hyperparameters.
    """

    wide = torch.float32

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        made = AdamStep([], [], [])
        for tensors in zip(parameters, gradients, first, second, strict=True):
            p, g, m, v = (tensor.to(self.wide) for tensor in tensors)
            for some, one in zip(made, self.step(p, g, m, v, step, hyper, decoupled, tensors[0].dtype), strict=True):
                some.append(one)
        return made

    def step(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: AdamHyper, decoupled: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the stepped parameter in `dtype`, and both moments in float32."""
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        p = self.decayed(p, h, decoupled) - self.update(m, v, step, h)
        return self.stored(p, dtype), self.kept(m), self.kept(v)

    def coupled(self, g: Tensor, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """Return the gradient with the decay, where it belongs there."""
        return g if decoupled else g + h.weight_decay * p

    def decayed(self, p: Tensor, h: AdamHyper, decoupled: bool) -> Tensor:
        """Return the parameter with the decay, where it belongs there."""
        return p * (1 - h.lr * h.weight_decay) if decoupled else p

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """Return the new moments."""
        return h.beta1 * m + (1 - h.beta1) * g, h.beta2 * v + (1 - h.beta2) * g * g

    def corrections(self, step: int, h: AdamHyper) -> tuple[float, float]:
        """Return what the moments are divided by."""
        return 1 - h.beta1**step, 1 - h.beta2**step

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """Return what is subtracted from the parameter."""
        first, second = self.corrections(step, h)
        return h.lr * ((m / first) / ((v / second).sqrt() + h.epsilon))

    def stored(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the parameter as it is stored."""
        return p.to(dtype)

    def kept(self, moment: Tensor) -> Tensor:
        """Return a moment as it is kept."""
        return moment.float()


class SGD(Optimizer):
    """SGD from its two steps.

    Legend: p parameter, d gradient with the decay, b momentum, h hyperparameters.
    """

    def sgd_step(
        self, parameters: Tensors, gradients: Tensors, momentum: Tensors, step: int, hyper: SGDHyper
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        made = SGDStep([], [])
        for p, g, b in zip(parameters, gradients, momentum, strict=True):
            d = hyper.weight_decay * p.float() + g.float()
            kept = self.momentum(b, d, step, hyper)
            made.momentum.append(kept)
            made.parameters.append(self.stored(p.float() - self.update(kept, d, hyper), p.dtype))
        return made

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """Return the new momentum: the first, and all where there is none, is the gradient itself."""
        return d if step == 1 or h.momentum == 0.0 else h.momentum * b + (1 - h.dampening) * d

    def update(self, b: Tensor, d: Tensor, h: SGDHyper) -> Tensor:
        """Return what is subtracted from the parameter."""
        return h.lr * b

    def stored(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the parameter as it is stored."""
        return p.to(dtype)
