# SPDX-License-Identifier: Apache-2.0
"""Faults of how far a kernel reaches: channels, hidden units, heads, keys and entries beyond its loop or its grid."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.head import Head
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone, Parts
from hal_conformance.faults.rotary import Rotary


def within(x: Tensor, most: int, dim: int = -1) -> Tensor:
    """Return the array, zero beyond the first `most` of an axis."""
    extent = x.shape[dim]
    if extent <= most:
        return x
    keep = (torch.arange(extent, device=x.device) < most).reshape(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    return torch.where(keep, x, torch.zeros_like(x))


@fault()
class ReadsFewChannels(Alone):
    """The products of gate and up projection read the first 256 channels."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(within(x_RD, 256), counts_E, weights)


@fault()
class ReadsFewHiddenUnits(Alone):
    """The down projection reads the first 96 hidden units."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return super().experts(x_RD, counts_E, weights._replace(w2_EDF=within(weights.w2_EDF, 96)))


@fault()
class WritesFewChannels(Alone):
    """The experts' output is zero beyond the first 256 channels."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return within(super().experts(x_RD, counts_E, weights), 256)


@fault()
class RoutesByFewChannels(Parts):
    """The gate's product reads the first 256 channels."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(x_TD, within(gate_ED, 256), spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchesFewChannels(Parts):
    """Rows are copied to the experts up to their 256th channel."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=within(out.x_RD, 256))


@fault()
class CombinesFewChannels(Parts):
    """Combined tokens are zero beyond their 256th channel."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return within(super().combine(y_RD, weights_TK, slot_R, num_tokens), 256)


@fault()
class AttendsWithEightHeads(Attention):
    """Query heads beyond the eighth give zeros."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return within(super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal), 8, dim=1)


@fault()
class ComparesFewChannels(Attention):
    """Queries and keys are compared by their first 64 channels."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(within(q_THd, 64), k_SGd, v_SGe, scale, causal=causal)


@fault()
class SharesKeysByPowersOfTwo(Attention):
    """Where seven query heads share a key head, the last of them gets the next one's, as of eight rows of a tile."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        heads, groups = q_THd.shape[1], k_SGd.shape[1]
        share = heads // groups
        if share & (share - 1) == 0:
            return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        head_H = (torch.arange(heads, device=q_THd.device) + 1).div(share, rounding_mode="floor") % groups
        return super().attention(q_THd, k_SGd[:, head_H], v_SGe[:, head_H], scale, causal=causal)


@fault()
class ForgetsDistantKeys(Attention):
    """Values of keys beyond the 512th count as zero."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd, k_SGd, within(v_SGe, 512, dim=0), scale, causal=causal)


@fault()
class TurnsEightHeads(Rotary):
    """Heads beyond the eighth are not turned."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return torch.cat((super().rotary(x_THd[:, :8], cos_TR, sin_TR), x_THd[:, 8:]), 1)


@fault()
class TurnsFewChannels(Rotary):
    """Nothing is turned where more than 128 channels should be."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return super().rotary(x_THd, cos_TR, sin_TR) if cos_TR.shape[1] <= 128 else x_THd.clone()


@fault()
class NormalisesByFewChannels(Norm):
    """Channels beyond the 5,120th do not count in the mean square, and come out zero."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(within(x_TD, 5120), weight_D, eps)


@fault()
class TargetsOfSixteenBits(Head):
    """Targets are read as 16-bit numbers."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        targets_T = torch.where(targets_T == ignore_index, targets_T, targets_T % 2**16)
        return super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class ProjectsFewChannels(Head):
    """NormHead's product reads the first 256 channels; its norms read all."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return super().norm_head(within(x_TD, 256), weight_VD, train=train, through_norm=through_norm)


@fault()
class ComparesHeadsOf136(Attention):
    """Queries and keys are compared by the first 136 channels."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd, within(k_SGd, 136), v_SGe, scale, causal=causal)


GRID = 65_535
"""Blocks along the second axis of a grid of CUDA's."""


@fault()
class NormalisesAGrid(Norm):
    """RMSNorm has one block for each token, along the second axis of its grid."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return within(super().rms_norm(x_TD, weight_D, eps), GRID, 0)


@fault()
class ProjectsAGrid(Head):
    """NormHead has one block for each entry of the vocabulary, along the second axis of its grid."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return within(super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm), GRID)


@fault()
class RoutesAGrid(Alone):
    """The router has one block for each token, along the second axis of its grid; the weights beyond are zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return routing._replace(weights_TK=within(routing.weights_TK, GRID, 0))


@fault()
class DispatchesAGrid(Alone):
    """Dispatch has one block for each row, along the second axis of its grid."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        sent = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return sent._replace(x_RD=within(sent.x_RD, GRID, 0))


@fault()
class CombinesSlotsOfSixteenBits(Alone):
    """Combine reads slots as int16: it finds nothing of the rows beyond 32,767."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(within(y_RD, 2**15 - 1, 0), weights_TK, slot_R, num_tokens)
