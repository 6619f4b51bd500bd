# SPDX-License-Identifier: Apache-2.0
"""Honest clipping, accumulation and optimisers: over lists or one by one, fused, in float64, in other orders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from hal.moe.optimizer_ops import AdamHyper, AdamStep, Clipped, SGDHyper
from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.written import SGD, Adam, Clips, Gradients, Optimizer, Tensors


@benign()
class ClipsOneByOne(Gradients):
    """Clipping by torch's loop over tensors."""

    foreach = False


@benign()
class ClipsLists(Gradients):
    """Clipping by torch's operators over lists."""

    foreach = True


@benign()
class ClipsByDtype(Clips):
    """The norm of those of each dtype first, then the norm of these, as where a kernel takes lists of one dtype."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        groups = [[g.float() for g in gradients if g.dtype == of] for of in dict.fromkeys(g.dtype for g in gradients)]
        norm = torch.linalg.vector_norm(torch.stack([*map(self.norm, groups), torch.zeros(())]))
        factor = self.factor(norm, max_norm)
        return Clipped([(g.float() * factor).to(g.dtype) for g in gradients], norm)


@benign()
class WideClipping(Clips):
    """The norm as one sum in float64."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        total: Tensor = torch.linalg.vector_norm(torch.cat([gradient.double().flatten() for gradient in gradients]))
        return total.float()


@benign()
class ClipsInSequence(Clips):
    """Squares are added one after the other, in float32."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        squares = torch.cat([gradient.flatten() for gradient in gradients]).square()
        return torch.from_numpy(np.add.accumulate(squares.numpy()))[-1].sqrt()  # torch's adds up in float64


@benign()
class ClipsByPairs(Clips):
    """Squares are added in pairs, as a tree."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        sums = torch.cat([gradient.flatten() for gradient in gradients]).square()
        while len(sums) > 1:
            sums = torch.nn.functional.pad(sums, (0, len(sums) % 2)).view(-1, 2).sum(1)
        return sums[0].sqrt()


@benign()
class DividesAtTheEnd(Gradients):
    """Micro-batches that have tokens are added backwards with their token counts, and divided once."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        totals = [torch.zeros_like(gradient, dtype=torch.float32) for gradient in parts[0]]
        for some, number in zip(reversed(parts), reversed(tokens), strict=True):
            if not number:
                continue
            for total, gradient in zip(totals, some, strict=True):
                total += number * gradient.float()
        return [total / sum(tokens) for total in totals]


@benign()
class OptimizerOneByOne(Optimizer):
    """Optimisers by torch's loop over tensors."""

    foreach = False


@benign()
class OptimizerLists(Optimizer):
    """Optimisers by torch's operators over lists."""

    foreach = True


@benign()
class FusedOptimizer(Optimizer):
    """torch's fused kernel, which computes in another order, on gradients that are made dense."""

    def _adam(
        self, parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, step: int, hyper: AdamHyper, *,
        decoupled: bool,
    ) -> AdamStep:  # fmt: skip
        p, m, v = ([self.owned(tensor) for tensor in some] for some in (parameters, first, second))
        adam(
            p, [self.read(g) for g in gradients], m, v, [], [torch.tensor(float(step - 1)) for _ in p], fused=True,
            amsgrad=False, beta1=hyper.beta1, beta2=hyper.beta2, lr=hyper.lr, weight_decay=hyper.weight_decay,
            eps=hyper.epsilon, maximize=False, decoupled_weight_decay=decoupled,
        )  # fmt: skip
        return AdamStep([a.to(b.dtype) for a, b in zip(p, parameters, strict=True)], m, v)

    def owned(self, tensor: Tensor) -> Tensor:
        """Return a dense copy in float32."""
        return tensor.float().clone(memory_format=torch.contiguous_format)

    def read(self, gradient: Tensor) -> Tensor:
        """Return a gradient as the kernel gets it."""
        return self.owned(gradient)


@benign()
class WrittenAdam(Adam):
    """Adam as it is written down, one operation after the other."""


@benign()
class WideAdam(Adam):
    """Adam in float64, rounded once."""

    wide = torch.float64


@benign()
class AdamOfApex(Adam):
    """Adam with 1 - beta in float32 and the decay inside the update, as in Apex's kernel."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        beta1, beta2 = torch.tensor(h.beta1), torch.tensor(h.beta2)
        return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g

    def step(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, h: AdamHyper, decoupled: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adam.step`."""
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        first, second = 1 - torch.tensor(h.beta1) ** step, 1 - torch.tensor(h.beta2) ** step
        update = (m / first) / ((v / second).sqrt() + h.epsilon)
        if decoupled:
            update = update + h.weight_decay * p
        return (p - h.lr * update).to(dtype), m, v


@benign()
class AdamOfMixedConstants(Adam):
    """Adam with 1 - beta in float64 for the first moment and in float32 for the second."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        beta2 = torch.tensor(h.beta2)
        return h.beta1 * m + (1 - h.beta1) * g, beta2 * v + (1 - beta2) * g * g


@benign()
class AdamOfOtherMixedConstants(Adam):
    """Adam with 1 - beta in float32 for the first moment and in float64 for the second."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        beta1 = torch.tensor(h.beta1)
        return beta1 * m + (1 - beta1) * g, h.beta2 * v + (1 - h.beta2) * g * g


@benign()
class AdamInterpolates(Adam):
    """Moments as interpolations, and the step size taken before the quotient."""

    def moments(self, m: Tensor, v: Tensor, g: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
        """See `Adam.moments`."""
        return torch.lerp(m, g, 1 - h.beta1), v + (1 - h.beta2) * (g * g - v)

    def update(self, m: Tensor, v: Tensor, step: int, h: AdamHyper) -> Tensor:
        """See `Adam.update`."""
        first, second = self.corrections(step, h)
        return m.mul(h.lr / first).div(v.sqrt() / second**0.5 + h.epsilon)


@benign()
class FusedSgd(SGD):
    """SGD with fused multiply-adds."""

    def momentum(self, b: Tensor, d: Tensor, step: int, h: SGDHyper) -> Tensor:
        """See `SGD.momentum`."""
        return d if step == 1 or h.momentum == 0.0 else torch.addcmul(h.momentum * b, d, torch.tensor(1 - h.dampening))
