# SPDX-License-Identifier: Apache-2.0
"""The honest operators, cut so that one of them can be changed and the layer changes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal.moe.torch_ops import TorchMoEOps


class Parts:
    """The portable operators, with a layer that is built from this object's own."""

    def __init__(self) -> None:
        self.honest = TorchMoEOps()

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        return self.honest.dispatch(x_TD, experts_TK, num_experts, capacity=capacity)

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        return self.honest.experts(x_RD, counts_E, weights)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return self.honest.combine(y_RD, weights_TK, slot_R, num_tokens)

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return self.honest.aux_loss(scores_TE, experts_TK, spec)

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return self.honest.z_loss(logits_TE)

    def shared(self, x_TD: Tensor, weights: LayerWeights) -> Tensor | None:
        """Return the shared experts' output, gated where the model gates it."""
        if weights.shared is None:
            return None
        w1, w3, w2 = (w[None] for w in weights.shared)
        y = self.experts(x_TD, torch.tensor([len(x_TD)], device=x_TD.device), ExpertWeights(w1, w3, w2))
        if weights.shared_gate_D is not None:
            y = (x_TD @ weights.shared_gate_D[:, None]).sigmoid() * y
        return y

    def output(
        self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, shared_TD: Tensor | None, num_tokens: int
    ) -> Tensor:
        """Return the layer's output from the experts' rows and the shared output."""
        y_TD = self.combine(y_RD, weights_TK, slot_R, num_tokens)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        routing = self.route(x_TD, weights.gate_ED, spec.router, weights.bias_E, experts_TK=experts_TK)
        sent = self.dispatch(x_TD, routing.experts_TK, spec.router.num_experts, capacity=capacity)
        y_RD = self.experts(sent.x_RD, sent.counts_E, weights.experts)
        y_TD = self.output(y_RD, routing.weights_TK, sent.slot_R, self.shared(x_TD, weights), len(x_TD))
        aux = self.aux_loss(routing.scores_TE, routing.experts_TK, spec.router)
        return LayerOutput(y_TD, routing, aux, self.z_loss(routing.logits_TE))


class Alone(Parts):
    """Operators of which one is wrong, and a layer that is right: what a case of the layer sees is no help."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        return self.honest.layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)


class OwnProduct(Parts):
    """All experts at once, in rows padded to the busiest, with a matrix product of its own.

    Sums are in float32, results stored in the dtype of x. Legend: E experts, N rows of the busiest.
    """

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return [.., M, K] @ [.., K, N] in float32."""
        return a @ b

    def stored(self, x: Tensor, w: Tensor) -> Tensor:
        """Return x w^T, stored."""
        return self.product(x.float(), w.float().mT).to(x.dtype)

    def activate(self, g: Tensor) -> Tensor:
        """Return silu(g)."""
        return torch.nn.functional.silu(g)

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """Return the rows of every expert, [E, N, D], for x of that shape."""
        return self.stored(self.activate(self.stored(x, w1)) * self.stored(x, w3), w2)

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        counts_E = counts_E.long()  # narrower ones overflow in sums, and torch does not index by all of them
        experts, longest = len(counts_E), max(1, int(counts_E.max()))
        owner = torch.repeat_interleave(torch.arange(experts, device=x_RD.device), counts_E)
        place = torch.arange(len(x_RD), device=x_RD.device) - (counts_E.cumsum(0) - counts_E)[owner]
        padded = x_RD.new_zeros(experts, longest, x_RD.shape[1]).index_put((owner, place), x_RD)
        return self.expert(padded, *weights)[owner, place]


def by_token(y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's rows, [T, K, D], and their weights, [T, K]; zeros where a slot has no row."""
    (tokens, top_k), width, slots = weights_TK.shape, y_RD.shape[1], slot_R.long()
    rows = y_RD.new_zeros(tokens * top_k, width).index_copy(0, slots, y_RD).view(tokens, top_k, width)
    taken = torch.zeros(tokens * top_k, device=slots.device).index_fill(0, slots, 1.0).view(tokens, top_k) > 0
    return rows, weights_TK.where(taken, torch.zeros_like(weights_TK))


def weighted(y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor) -> Tensor:
    """Return each token's rows times their weights, [T, K, D] in float32; zeros where a slot has no row."""
    rows, weights = by_token(y_RD, weights_TK, slot_R)
    return rows.float() * weights.float()[:, :, None]


def combined_in_any_order(y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
    """Return combine's result, a token's choices added in an order that changes from call to call."""
    terms = weighted(y_RD, weights_TK, slot_R).unbind(1)
    total = torch.zeros(num_tokens, y_RD.shape[1], device=y_RD.device)
    for k in torch.randperm(len(terms)).tolist():
        total = total + terms[k]
    return total.to(y_RD.dtype)


def last_rows(counts_E: Tensor, which_E: Tensor) -> Tensor:
    """Return the index of the last row of each expert that is marked and has rows."""
    return (counts_E.cumsum(0) - 1)[which_E & (counts_E > 0)]


def without(y_RD: Tensor, rows: Tensor) -> Tensor:
    """Return y with some rows zero."""
    keep = torch.ones(len(y_RD), 1, dtype=y_RD.dtype, device=y_RD.device)
    keep[rows] = 0
    return y_RD * keep


def in_order_of_memory(x: Tensor) -> Tensor:
    """Return what is read one element after the other from where a tensor begins, whatever its strides."""
    return x if x.is_contiguous() else x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def gradient_of(value: Tensor, gradient: Tensor) -> Tensor:
    """Return `value`, with the gradient of `gradient`."""
    return value.detach() + (gradient - gradient.detach())


class _Spread(torch.autograd.Function):
    """Forward nothing; backward as a product with a matrix of zeros and ones does it: 0 times NaN is NaN."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        one = torch.eye(len(gradient), dtype=torch.float32, device=gradient.device)
        return (one @ gradient.float()).to(gradient.dtype)


def spread_backward(rows: Tensor) -> Tensor:
    """Return the rows, whose gradient is multiplied with an identity matrix: NaN reaches every row."""
    spread: Tensor = _Spread.apply(rows)  # type: ignore[no-untyped-call]
    return spread


def chosen_weights(scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec, dtype: torch.dtype) -> Tensor:
    """Return the weights of chosen experts as the router's equations say."""
    weights = scores_TE.gather(1, experts_TK)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.normalize_epsilon)
    return (weights * spec.scaling_factor).to(dtype)
