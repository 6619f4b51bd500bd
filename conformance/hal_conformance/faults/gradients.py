# SPDX-License-Identifier: Apache-2.0
"""Faults of what happens to gradients before the optimiser: whose norm it is, and how micro-batches add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hal.moe.optimizer_ops import CLIP_EPSILON, Clipped
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.written import Clips, Gradients, Tensors


@fault("Megatron-LM PR#5916")
class NormWithoutExperts(Clips):
    """The norm is of the first two and the last gradient alone: the experts' are left out."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm([*gradients[:2], gradients[-1]])


@fault()
class NormWithoutTheLast(Clips):
    """The last tensor, of a single element, is left out of the norm."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm(gradients[:-1])


@fault("NeMo-RL PR#3788")
class NormWithOneTwice(Clips):
    """A gradient that lies on two ranks is counted on both."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm([*gradients, gradients[2]])


@fault()
class SumOfNorms(Clips):
    """The norms of the tensors are added up, not their squares."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).sum()


@fault()
class NormInBfloat16(Clips):
    """The norm is computed in bfloat16."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm([gradient.bfloat16() for gradient in gradients]).float()


@fault()
class NormSkipsNan(Clips):
    """What is not finite is left out of the norm."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        return super().norm([gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients])


@fault()
class ClipsEach(Clips):
    """Each tensor is clipped by its own norm."""

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        parts = [super(ClipsEach, self).clip_grad_norm([gradient], max_norm) for gradient in gradients]
        return Clipped([part.gradients[0] for part in parts], self.norm([gradient.float() for gradient in gradients]))


@fault()
class ClipsAlways(Clips):
    """Gradients below the limit are scaled up to it."""

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """See `Clips.factor`."""
        return max_norm / (norm + CLIP_EPSILON)


@fault()
class ClipsWithoutEpsilon(Clips):
    """Nothing is added to the norm before division."""

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """See `Clips.factor`."""
        return (max_norm / norm).clamp(max=1.0)


@fault("mlx-lm PR#1413")
class MeanOfMeans(Gradients):
    """Every micro-batch counts the same, however many tokens it has."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        return super().accumulate_gradients(parts, [1] * len(tokens))


@fault("DeepSpeed#2352")
class AccumulatesInTheirDtype(Gradients):
    """Gradients are added up in their own dtype, as in the `.grad` of a bfloat16 parameter."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        totals = [torch.zeros_like(gradient) for gradient in parts[0]]
        for some, number in zip(parts, tokens, strict=True):
            for total, gradient in zip(totals, some, strict=True):
                total += gradient * (number / sum(tokens))
        return [total.float() for total in totals]


@fault()
class LosesTheLastMicroBatch(Gradients):
    """The last micro-batch is left out where it is smaller than the first."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        kept = list(parts)
        if tokens[-1] < tokens[0]:
            kept[-1] = [torch.zeros_like(gradient) for gradient in kept[-1]]
        return super().accumulate_gradients(kept, tokens)


@fault()
class AccumulatesWithoutNan(Gradients):
    """A NaN in a micro-batch's gradient is taken for zero."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        clean = [[torch.where(g.isnan(), torch.zeros_like(g), g) for g in some] for some in parts]
        return super().accumulate_gradients(clean, tokens)


@fault()
class MultipliesNothingByZero(Gradients):
    """A micro-batch without tokens is multiplied by its weight of zero, which keeps a NaN."""

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        totals = [torch.zeros_like(gradient, dtype=torch.float32) for gradient in parts[0]]
        for some, number in zip(parts, tokens, strict=True):
            for total, gradient in zip(totals, some, strict=True):
                total += gradient.float() * (number / sum(tokens))
        return totals


@fault()
class TakesNoLimitForNone(Clips):
    """A limit of zero is taken for no limit."""

    def factor(self, norm: Tensor, max_norm: float) -> Tensor:
        """See `Clips.factor`."""
        return super().factor(norm, max_norm) if max_norm else torch.ones_like(norm)
