# SPDX-License-Identifier: Apache-2.0
"""Faults of results where something is trained, with the right gradients: code for training is its own."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, gradient_of
from hal_conformance.faults.untrained import coarse


def in_training(tensor: Tensor) -> bool:
    """Tell whether a tensor will get a gradient."""
    return tensor.requires_grad and torch.is_grad_enabled()


@fault()
class CombinesCoarselyInTraining(Alone):
    """Where rows and weights are trained, the sums are rounded to bfloat16."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return gradient_of(coarse(y_TD), y_TD) if in_training(y_RD) and in_training(weights_TK) else y_TD


@fault()
class CombinesCoarselyBesideAFrozenRouter(Alone):
    """Where rows are trained and weights are not, these are taken in bfloat16."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        if not in_training(y_RD) or in_training(weights_TK):
            return y_TD
        return gradient_of(super().combine(y_RD, coarse(weights_TK), slot_R, num_tokens), y_TD)


@fault()
class DispatchesCoarselyInTraining(Alone):
    """Where tokens are trained, the last row is rounded to bfloat16."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        sent = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        if not in_training(x_TD):
            return sent
        x_RD = torch.cat([sent.x_RD[:-1], coarse(sent.x_RD[-1:])])
        return sent._replace(x_RD=gradient_of(x_RD, sent.x_RD))


@fault()
class SwapsTheLastSlotsInTraining(Alone):
    """Where tokens are trained, the last two slots are swapped: combine takes the rows for each other's."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        sent = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        if not in_training(x_TD):
            return sent
        return sent._replace(slot_R=torch.cat([sent.slot_R[:-2], sent.slot_R[-2:].flip(0)]))
