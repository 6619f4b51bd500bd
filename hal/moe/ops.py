# SPDX-License-Identifier: Apache-2.0
"""The MoE operators as an interface: what the conformance suite checks and what a layer is built from.

Legend: T tokens, D model dim, F expert hidden dim, E routed experts, K choices per token, S shared experts'
total hidden width, R routed rows (T * K, or fewer where a capacity drops some). A *slot* is a (token, choice)
pair as the flat index t * K + k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hal.moe.model_spec import MoEModelSpec
    from hal.moe.router_spec import RouterSpec


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        logits_TE: in the gate's dtype.
        scores_TE: float32 (float64 for float64 logits), of the logits as they are stored, in the gate's dtype.
        experts_TK: int64, by descending selection score, ties to the lower expert index.
        weights_TK: in the spec's `weight_dtype`, of the experts in that order.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor


class Dispatch(NamedTuple):
    """Tokens, copied once per choice and sorted by expert, then by slot.

    Attributes:
        x_RD: the rows.
        slot_R: int64, the slot that each row answers.
        counts_E: int64, rows of each expert.
    """

    x_RD: Tensor
    slot_R: Tensor
    counts_E: Tensor


class ExpertWeights(NamedTuple):
    """The routed experts' matrices: gate, up and down projection."""

    w1_EFD: Tensor
    w3_EFD: Tensor
    w2_EDF: Tensor


class SharedWeights(NamedTuple):
    """The shared experts' matrices, as one expert of width S: gate, up and down projection."""

    w1_SD: Tensor
    w3_SD: Tensor
    w2_DS: Tensor


class LayerWeights(NamedTuple):
    """All weights of one MoE layer."""

    gate_ED: Tensor
    bias_E: Tensor | None
    experts: ExpertWeights
    shared: SharedWeights | None = None
    shared_gate_D: Tensor | None = None


class LayerOutput(NamedTuple):
    """What a layer returns.

    Neither loss is multiplied by its coefficient: the caller adds `spec.balance_coefficient * aux_loss` and
    `spec.z_coefficient * z_loss` where these are not None.
    """

    y_TD: Tensor
    routing: Routing
    aux_loss: Tensor
    z_loss: Tensor


class MoEOps(Protocol):
    """The operators. All are differentiable; nothing here draws random numbers or keeps state.

    A graph that is kept (`retain_graph=True`) may be run backward again, with the same gradients. Sizes are multiples
    of nothing: what an implementation cannot do, though it fits together, it refuses by `hal.errors.Unsupported`.

    Every method raises `hal.errors.ShapeError` for shapes, dtypes and devices that do not fit together. Floating-point
    tensors are float16, bfloat16, float32 or float64, indices and counts uint8, int8, int16, int32 or int64. An
    implementation under test may have only some of the methods.
    """

    def route(
        self,
        x_TD: Tensor,
        gate_ED: Tensor,
        spec: RouterSpec,
        bias_E: Tensor | None = None,
        *,
        experts_TK: Tensor | None = None,
    ) -> Routing:
        """Choose K experts for each token, and their weights.

        Scores are those of the stored logits: a product in float32 is rounded to the gate's dtype first.
        All but the experts are differentiable. A NaN among a token's activations makes its logits, scores and weights
        NaN. Of an infinite one the logits are infinite (or NaN); softmax scores are then NaN, sigmoid scores 1 and 0.
        Its experts are distinct and in range all the same, and no other token is affected.

        Args:
            x_TD: activations.
            gate_ED: the router's matrix.
            spec: the router's equations.
            bias_E: added to the scores for the choice, in which -inf leaves an expert out as long as K others are
                left; it has no gradient (None, or zeros). Given exactly if `spec.selection_bias`.
            experts_TK: a routing to be replayed: these experts, in this order, with weights computed anew.
        """
        ...

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        num_experts: int,
        *,
        capacity: int | None = None,
    ) -> Dispatch:
        """Copy each token to its experts, rows sorted by expert, then by slot.

        Backward, a token's gradient is the sum of its rows' gradients, in float32 (float64 for float64), rounded once
        to the dtype of `x_TD`: a sum in 16 bits would lose more with every choice.

        Args:
            x_TD: activations.
            experts_TK: the chosen experts.
            num_experts: E.
            capacity: most rows per expert; the slots that come last (token by token, choice by choice) are
                dropped. None drops nothing.
        """
        ...

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """Return w2 (silu(w1 x) * (w3 x)) of each row's expert, [R, D].

        The rows lie as `dispatch` leaves them. silu's argument, the two factors, their product and the result
        are each stored in the dtype of `x_RD`.

        A row's result depends on that row alone. What is not finite goes through as IEEE 754 says: a result that
        overflows is infinite, not the largest finite number. A NaN, in a row or in its upstream gradient, reaches the
        gradients of that row and of its expert's weights.
        """
        ...

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """Add up each token's rows, weighted: [T, D] in the dtype of `y_RD`.

        Products and sum are in float32 (float64 for float64 rows). The order of the sum is the implementation's own:
        the portable one adds over k = 0..K-1, another may add otherwise, and the suite's bounds admit every order. A
        slot without a row adds nothing, whatever its weight, whose gradient is zero.
        """
        ...

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """Return E / (K T) * sum_e count_e * mean_t p_te.

        p is softmax scores as they are, and sigmoid scores divided by (their sum over E + 1e-20). A float32 scalar, 1
        for perfectly even routing, 0 for zero tokens; the coefficient is not applied; counts carry no gradient. A NaN
        or an infinity among the scores of an expert that was chosen shows in the loss, and in no other token's
        gradient.
        """
        ...

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """Return mean_t logsumexp_e(logits_te)^2, a float32 scalar; the coefficient is not applied.

        Zero tokens give 0. Of a NaN among the logits the loss is NaN, of +inf infinite (or NaN); no other token's
        gradient changes.
        """
        ...

    def layer(
        self,
        x_TD: Tensor,
        weights: LayerWeights,
        spec: MoEModelSpec,
        *,
        experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:
        """Route, dispatch, run the experts, combine, and add the shared experts' output."""
        ...
