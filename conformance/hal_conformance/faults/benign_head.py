# SPDX-License-Identifier: Apache-2.0
"""Honest heads and losses: float64, blocks of the vocabulary, tokens in chunks, a gradient as kernels have it."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_conformance.faults.benign_norm import total
from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.head import Divided, Head, OwnLoss


@benign()
class WideHead(Head):
    """The head and its loss in float64, rounded once."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        logits = super().norm_head(x_TD.double(), weight_VD.double(), train=train, through_norm=through_norm)
        return logits.to(x_TD.dtype)

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        wide = logits_TV.double()
        return super().cross_entropy(wide, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient).float()


@benign()
class NormInBlocks(Head):
    """The head's norm from sums over blocks of seven entries."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        wide = weight_VD.float()
        # A root has no slope at 0; a column of zeros must not be NaN.
        square = total(wide * wide, 0, 7).clamp(min=torch.finfo(torch.float32).tiny)
        norm = (square if through_norm else square.detach()).sqrt()
        logits = x_TD @ (wide / (norm + 1e-7)).to(x_TD.dtype).t()
        return logits if train else logits.detach()


@benign()
class DividesTokens(Divided):
    """NormHead that divides x by the norms, in float32, instead of the weights."""


@benign()
class ChunkedVocabulary(OwnLoss):
    """Cross-entropy over chunks of 1,000 entries, with an online sum."""

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """See `OwnLoss.lse`."""
        top, summed = torch.full_like(wide_TV[:, :1], -torch.inf), torch.zeros_like(wide_TV[:, :1])
        for part in wide_TV.split(1000, 1):
            new = torch.maximum(top, part.detach().amax(1, keepdim=True))
            summed, top = summed * (top - new).exp() + (part - new).exp().sum(1, keepdim=True), new
        return (top + summed.log())[:, 0]


@benign()
class ChunkedTokens(Head):
    """Cross-entropy of chunks of five tokens, each a sum that is divided at the end."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        summed = logits_TV.float()[:0].sum()
        for logits, targets in zip(logits_TV.split(5), targets_T.split(5), strict=True):
            mean = super().cross_entropy(logits, targets, ignore_index=ignore_index, z_coefficient=z_coefficient)
            summed = summed + mean * (targets != ignore_index).sum()
        return summed / (targets_T != ignore_index).sum().clamp(min=1)


@benign()
class FusedLoss(Head):
    """Cross-entropy whose gradient is the probabilities less one at the target, as kernels have it."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        honest, counts_T = super().cross_entropy, targets_T != ignore_index

        def gradient(dy: Tensor, logits: Tensor) -> Tensor:
            wide = logits.float()
            lse = wide.logsumexp(1, keepdim=True)
            p = (wide - lse).exp() * (1.0 + 2.0 * z_coefficient * lse)
            p[torch.arange(len(p))[counts_T], targets_T[counts_T]] -= 1.0
            return (torch.where(counts_T[:, None], p, 0.0) * (dy / counts_T.sum().clamp(min=1))).to(logits.dtype)

        def loss(logits: Tensor) -> Tensor:
            return honest(logits, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)

        return by_hand(loss, gradient, logits_TV)
