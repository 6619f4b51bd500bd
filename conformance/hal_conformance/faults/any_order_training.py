# SPDX-License-Identifier: Apache-2.0
"""Operators that surround the experts, and these alone, which add in another order each time."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import ExpertWeights
from hal.moe.optimizer_ops import Clipped
from hal.moe.router_spec import RouterSpec
from hal.moe.torch_training_ops import TorchTrainingOps
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone
from hal_conformance.faults.written import Gradients, Tensors


def shuffled(count: int, like: Tensor) -> Tensor:
    """Return an order that nobody knows beforehand."""
    return torch.randperm(count, device=like.device)


class Around(TorchTrainingOps):
    """The portable operators, of which one runs in another order each time."""


@fault()
class AttentionInAnyOrder(Around):
    """Attention sums the channels of its logits in another order each time."""

    families = ("attention", "determinism")

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        order = shuffled(q_THd.shape[2], q_THd)
        return super().attention(q_THd[..., order], k_SGd[..., order], v_SGe, scale, causal=causal)


@fault()
class NormsInAnyOrder(Around):
    """RMSNorm sums the squares in another order each time."""

    families = ("norm", "determinism")

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        order = shuffled(x_TD.shape[1], x_TD)
        return super().rms_norm(x_TD[:, order], weight_D[order], eps)[:, order.argsort()]


@fault()
class CentresInAnyOrder(Around):
    """LayerNorm takes mean and variance in another order each time."""

    families = ("norm", "determinism")

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        order = shuffled(x_TD.shape[1], x_TD)
        return super().layer_norm(x_TD[:, order], weight_D[order], bias_D[order], eps)[:, order.argsort()]


@fault()
class EntropyInAnyOrder(Around):
    """Cross-entropy sums over the vocabulary in another order each time."""

    families = ("head", "determinism")

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        order = shuffled(logits_TV.shape[1], logits_TV)
        place = order.argsort()[targets_T.clamp(min=0)]
        targets_T = torch.where(targets_T == ignore_index, -100, place)
        return super().cross_entropy(logits_TV[:, order], targets_T, z_coefficient=z_coefficient)


@fault()
class ExpertsInAnyOrder(Alone):
    """The experts, called alone, sum over their hidden units in another order each time."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        order = shuffled(weights.w1_EFD.shape[1], x_RD)
        w1_EFD, w3_EFD, w2_EDF = weights
        turned = ExpertWeights(w1_EFD[:, order], w3_EFD[:, order], w2_EDF[:, :, order])
        return super().experts(x_RD, counts_E, turned)


class OtherBits:
    """Moves numbers by one bit in every second call: what another order of a sum does, and does more surely."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def moved(self, number: Tensor) -> Tensor:
        """Return a number or its neighbour, with the gradient of the former."""
        self.calls += 1
        neighbour = torch.nextafter(number.detach(), torch.full_like(number, torch.inf))
        return number + (neighbour - number.detach()) if self.calls % 2 else number


@fault()
class BalancesInAnyOrder(OtherBits, Alone):
    """The balance loss has another last bit each time, as sums by atomic additions do."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return self.moved(super().aux_loss(scores_TE, experts_TK, spec))


@fault()
class ZInAnyOrder(OtherBits, Alone):
    """The z-loss has another last bit each time, as sums by atomic additions do."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return self.moved(super().z_loss(logits_TE))


@fault()
class ClipsInAnyOrder(OtherBits, Gradients):
    """The norm of all gradients has another last bit each time, as sums by atomic additions do."""

    families = ("gradients", "determinism")

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped, norm = super().clip_grad_norm(gradients, max_norm)
        return Clipped(clipped, self.moved(norm))
