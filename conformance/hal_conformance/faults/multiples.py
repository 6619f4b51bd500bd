# SPDX-License-Identifier: Apache-2.0
"""Faults at sizes that real models have and small examples have not: whole tiles, many choices, blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.extents import GRID, within
from hal_conformance.faults.head import Head, OwnLoss
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone, Parts
from hal_conformance.faults.written import Clips


def _is_multiple(size: int, of: int) -> bool:
    return size > 0 and size % of == 0


@fault()
class LosesATileOfHiddenUnits(Alone):
    """Experts whose hidden units are a multiple of 128 lose the last 64 of them."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        hidden = weights.w1_EFD.shape[1]
        if _is_multiple(hidden, 128):
            weights = weights._replace(w2_EDF=within(weights.w2_EDF, hidden - 64))
        return super().experts(x_RD, counts_E, weights)


@fault()
class RunsExpertsOnAGrid(Alone):
    """The experts have one block for each row, along the second axis of their grid."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return within(super().experts(x_RD, counts_E, weights), GRID, 0)


@fault()
class RoutesByAllButATile(Parts):
    """Of channels that are a multiple of 256 the gate's product loses the last 16."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        width = x_TD.shape[1]
        if _is_multiple(width, 256):
            gate_ED = within(gate_ED, width - 16)
        return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class RoutesAllButTheLastOfABlock(Parts):
    """Of tokens that are a multiple of 256 the last one has weights of zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if _is_multiple(len(x_TD), 256):
            return routing._replace(weights_TK=within(routing.weights_TK, len(x_TD) - 1, 0))
        return routing


@fault()
class CombinesAllButATile(Parts):
    """Of channels that are a multiple of 256 the sums lack the last 16."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return within(y_TD, y_TD.shape[1] - 16) if _is_multiple(y_TD.shape[1], 256) else y_TD


@fault()
class CombinesAllButTheLastOfABlock(Alone):
    """Of tokens that are a multiple of 256 the last one's sum is zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return within(y_TD, num_tokens - 1, 0) if _is_multiple(num_tokens, 256) else y_TD


@fault()
class CombinesEightChoices(Alone):
    """A token's choices beyond the eighth are not added."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(y_RD, within(weights_TK, 8), slot_R, num_tokens)


@fault()
class DropsOneTooFew(Alone):
    """Of more than 128 tokens every expert takes one row beyond its capacity, which each block counts anew."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        if capacity is not None and len(x_TD) > 128:
            capacity += 1
        return super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)


@fault()
class BalancesAGrid(Alone):
    """The balance loss counts the first 65,535 tokens."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE[:GRID], experts_TK[:GRID], spec)


@fault()
class NormalisesOtherwiseIn256(Norm):
    """Of channels that are a multiple of 256 RMSNorm's result is 1 % too large."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        return y_TD * 1.01 if _is_multiple(x_TD.shape[1], 256) else y_TD


@fault()
class NormalisesAllButTheLastOfABlock(Norm):
    """Of tokens that are a multiple of 256 RMSNorm's last one is zero."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        return within(y_TD, len(y_TD) - 1, 0) if _is_multiple(len(y_TD), 256) else y_TD


@fault()
class ProjectsAGridOfTokens(Head):
    """NormHead has one block for each token, along the second axis of its grid."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return within(super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm), GRID, 0)


@fault()
class AveragesAGrid(Head):
    """Cross-entropy has one block for each token, along the second axis of its grid."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        return super().cross_entropy(
            logits_TV[:GRID], targets_T[:GRID], ignore_index=ignore_index, z_coefficient=z_coefficient
        )


@fault()
class SumsAllButABlock(OwnLoss):
    """Of a vocabulary that is a multiple of 256, and several tokens, the log-sum-exp lacks the last 16 entries."""

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """See `OwnLoss.lse`."""
        tokens, vocabulary = wide_TV.shape
        return super().lse(wide_TV[:, :-16] if tokens > 1 and _is_multiple(vocabulary, 256) else wide_TV, dtype)


@fault()
class CountsIgnoredTargetsOfMinusOne(Head):
    """An ignored target of -1 counts, as the first entry."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        if ignore_index == -1:
            targets_T, ignore_index = targets_T.clamp(min=0), -100
        return super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class ZOfAVocabularyWithoutGradient(Head):
    """The z-loss of more than 65,536 entries has no gradient."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        loss = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
        if logits_TV.shape[1] <= 2**16 or not z_coefficient:
            return loss
        without = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index)
        return without + (loss - without).detach()


@fault()
class ClipsByRoundedVectors(Clips):
    """The norms of tensors with one axis are kept in bfloat16."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See `Clips.norm`."""
        each = [torch.linalg.vector_norm(g) for g in gradients]
        each = [n.bfloat16().float() if g.dim() == 1 else n for n, g in zip(each, gradients, strict=True)]
        total: Tensor = torch.linalg.vector_norm(torch.stack(each))
        return total
