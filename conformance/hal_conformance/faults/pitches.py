# SPDX-License-Identifier: Apache-2.0
"""Faults of rows inside a larger buffer: kernels that take one row to follow the other, as if the memory were dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.head import Head
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import Alone, in_order_of_memory
from hal_conformance.faults.rotary import Rotary


def as_dense(x: Tensor) -> Tensor:
    """Return what is read where rows are taken to follow one another; elements of a row do, or a copy is asked for."""
    return in_order_of_memory(x) if x.stride(-1) == 1 else x


class _Upstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return as_dense(upstream[0])


def with_dense_upstream(x: Tensor) -> Tensor:
    """Return a result whose gradient is read as if it were dense."""
    result: Tensor = _Upstream.apply(x)  # type: ignore[no-untyped-call]
    return result


@fault()
class RmsNormOfDenseRows(Norm):
    """RMSNorm takes tokens for dense in memory."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(as_dense(x_TD), weight_D, eps)


@fault()
class LayerNormOfADenseUpstream(Norm):
    """LayerNorm's backward pass takes its upstream gradient for dense in memory."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return with_dense_upstream(super().layer_norm(x_TD, weight_D, bias_D, eps))


@fault()
class RotaryOfADenseUpstream(Rotary):
    """Rotary embedding's backward pass takes its upstream gradient for dense in memory."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return with_dense_upstream(super().rotary(x_THd, cos_TR, sin_TR))


@fault()
class AttentionOfDenseQueries(Attention):
    """Attention takes queries for dense in memory, which are columns of a product of q, k and v at once."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(as_dense(q_THd), k_SGd, v_SGe, scale, causal=causal)


@fault()
class AttentionOfADenseUpstream(Attention):
    """Attention's backward pass takes dO for dense in memory."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return with_dense_upstream(super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal))


@fault()
class LatentOfDenseKeys(Attention):
    """Latent attention takes the rotated keys for dense in memory, which are columns beside the latent."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        given = q_THd, q_THR, latent_SL, as_dense(k_SR), up_k_HdL, up_v_HeL
        return super().latent_attention(*given, scale, causal=causal)


@fault()
class HeadOfDenseWeights(Head):
    """NormHead takes its weights for dense in memory."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return super().norm_head(x_TD, as_dense(weight_VD), train=train, through_norm=through_norm)


@fault()
class EntropyOfDenseLogits(Head):
    """Cross-entropy takes logits for dense in memory, which are those of a padded vocabulary."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        logits = as_dense(logits_TV)
        return super().cross_entropy(logits, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class RouterOfDenseTokens(Alone):
    """The router takes tokens for dense in memory."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return super().route(as_dense(x_TD), gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class DispatchOfADenseUpstream(Alone):
    """Dispatch's backward pass takes its upstream gradient for dense in memory."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        sent = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return sent._replace(x_RD=with_dense_upstream(sent.x_RD))


@fault()
class CombineOfDenseRows(Alone):
    """Combine takes the experts' rows for dense in memory."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return super().combine(as_dense(y_RD), weights_TK, slot_R, num_tokens)


@fault()
class ZOfDenseLogits(Alone):
    """The z-loss takes logits for dense in memory."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(as_dense(logits_TE))
