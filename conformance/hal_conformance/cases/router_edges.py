# SPDX-License-Identifier: Apache-2.0
"""The router at its edges: exact ties, and tokens that are degenerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.case import F64, I64, Array, Arrays, Params
from hal_conformance.cases.base import fields_of, gate_storage, router_arrays, shape, weight_storage, wide
from hal_conformance.cases.router import ROUTING, RouterCase, TopkSet, judge_routing, judge_stages
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.detectors import Finding, discrete, exact, judge
from hal_conformance.numerics.margins import Certainty, judge_choice
from hal_conformance.oracle.routing import scores_of, weights_of

if TYPE_CHECKING:
    import torch

# Logits 0..3 only: their sigmoids have no two equal sums of pairs, so that groups tie only where their pairs do.
TIED_LOGITS = 4


def columns_of(gate_ED: Array, p: Params) -> Arrays:
    """Return one-hot tokens, whose logits are the gate's columns, exactly, and a bias that changes nothing."""
    spec, s = preset(p.preset).router, shape(p)
    hot = np.zeros((s.tokens, s.width))
    hot[np.arange(s.tokens), np.arange(s.tokens) % s.width] = 1.0
    arrays = {"x_TD": make.store(hot, p.dtype), "gate_ED": make.store(gate_ED, gate_storage(spec, p))}
    if spec.selection_bias:
        arrays["bias_E"] = np.zeros(spec.num_experts, np.float32)
    return arrays


def tied(p: Params) -> Arrays:
    """Return one-hot tokens and a gate of small integers, so that every logit is exact and most tie.

    In a router with groups, every second token has two experts above the others in each group, equal ones in some.
    Where all experts tie, the best two are alike in every group, and one that is not found makes no difference.
    """
    spec, width = preset(p.preset).router, shape(p).width
    gate = make.integers(p.seed, "tie/gate", 0, TIED_LOGITS - 1, spec.num_experts, width)
    if spec.num_groups > 1:
        grouped = gate.reshape(spec.num_groups, spec.group_size, width)
        order = np.argsort(make.words(p.seed, "tie/places", *grouped.shape), axis=1)
        best = make.integers(p.seed, "tie/best", 1, TIED_LOGITS - 1, spec.num_groups, 2, width)
        sparse = np.zeros_like(grouped)
        np.put_along_axis(sparse, order[:, :2], best, axis=1)
        gate = np.where(np.arange(width) % 2, sparse, grouped).reshape(gate.shape)
    return columns_of(gate, p)


class TieOrder(RouterCase):
    """Exact ties go to the lower index."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: one-hot tokens and integer weights, so that every logit is exact and most tie."""
        return tied(p)

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        exact = wide(inputs["x_TD"]) @ wide(inputs["gate_ED"]).T
        return [
            discrete("logits", outputs["logits_TE"], exact),
            discrete("experts", outputs["experts_TK"], lowest_first(exact, spec)),
        ]


def lowest_first(logits_TE: F64, spec: RouterSpec) -> I64:
    """Return the K best experts of integer logits, ties to the lower index, groups likewise."""
    # Scores rise with the logits, so the logits rank; only a group's sum of two needs the scores themselves.
    rank = logits_TE.copy()
    if spec.top_groups < spec.num_groups:
        grouped = rank.reshape(len(rank), spec.num_groups, spec.group_size)
        if spec.group_score == "max":
            group = grouped.max(-1)
        else:
            table = 1.0 / (1.0 + np.exp(-np.arange(TIED_LOGITS, dtype=np.float64)))
            group = np.sort(table[grouped.astype(np.int64)], -1)[..., -2:].sum(-1)
        kept = np.argsort(-group, 1, kind="stable")[:, : spec.top_groups]
        mask = np.ones((len(rank), spec.num_groups), bool)
        mask[np.arange(len(rank))[:, None], kept] = False
        rank[np.repeat(mask, spec.group_size, axis=1)] = -np.inf
    return np.argsort(-rank, 1, kind="stable")[:, : spec.top_k].astype(np.int64)


CLOSE = 2.0**-12
"""Logits of `CloseScores` lie on this grid: their float32 scores are apart, and in 16 bits most are equal."""


class CloseScores(RouterCase):
    """Scores so close that only their float32 values tell them apart."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: one-hot tokens; each token's logits are different multiples of `CLOSE` below 1/16.

        At most 8 bits each, so they are exact in every dtype. exp turns a step into a relative 2.4e-4 of the score, a
        sigmoid into 1.2e-4: hundreds of float32 ulps, a sixteenth of bfloat16's.
        """
        experts, width = preset(p.preset).router.num_experts, shape(p).width
        order = np.argsort(make.words(p.seed, "close/order", width, experts), axis=1, kind="stable")
        return columns_of(order.T * CLOSE, p)

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`: the choice alone, since all tokens have the same weights in another order."""
        logits = outputs["logits_TE"]
        scores = scores_of(logits, spec, level(logits.size))
        return [
            exact("logits", logits, wide(inputs["x_TD"]) @ wide(inputs["gate_ED"]).T),
            judge_routing(outputs["experts_TK"], scores, inputs, spec),
        ]


NAN, INFINITE, ZERO, HUGE, NEGATIVE, VANISHING = range(6)
"""Tokens of `Degenerate`."""
FADE = 46.0
"""exp(-46) is 1e-20: scores as small as the epsilon that is added to their sum."""


class Degenerate(RouterCase):
    """NaN, infinity, all equal, logits in the thousands, and scores that vanish."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the first six tokens are degenerate, the rest are ordinary."""
        arrays = router_arrays(p, "degenerate")
        spec, x = preset(p.preset).router, arrays["x_TD"].copy()
        x[NAN, 3] = np.nan
        # Of a softmax of nothing but -inf opinions differ; so the first expert has +inf.
        x[INFINITE, 5] = np.copysign(np.inf, wide(arrays["gate_ED"][0, 5]))
        x[ZERO] = 0
        x[HUGE] = x[HUGE] * np.asarray(64, x.dtype)
        x[NEGATIVE] = -x[HUGE]
        channel = 7
        x[VANISHING] = 0
        x[VANISHING, channel] = -FADE
        arrays["x_TD"] = x
        gate = arrays["gate_ED"].copy()
        steps = make.permutation(p.seed, "degenerate/steps", spec.num_experts) / (2.0 * spec.num_experts)
        gate[:, channel] = make.store(1.0 + steps, gate_storage(spec, p))
        arrays["gate_ED"] = gate
        if "bias_E" in arrays:
            arrays["bias_E"] = np.zeros_like(arrays["bias_E"])
        return arrays

    @np.errstate(all="ignore")
    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`: distinct and in range for all; for finite tokens everything as ever.

        Of a NaN everything is NaN. Of an infinite activation the logits are infinite; NaN is right, too, since units
        that split a float32 into parts take inf - inf. What follows is judged from the device's own logits. Nothing of
        this is promised where the contract replaces infinities and NaN.
        """
        chosen = outputs["experts_TK"]
        everyone = np.ones((len(chosen), spec.num_experts), bool)
        distinct = judge_choice(chosen, Certainty(~everyone, everyone))
        if distinct.status.colour == "red":
            return [distinct]
        finite, odd = (
            ({**inputs, "x_TD": inputs["x_TD"][part]}, {name: array[part] for name, array in outputs.items()})
            for part in (slice(ZERO, None), slice(ZERO))
        )
        zero = np.zeros((1, spec.num_experts))
        found = [
            *judge_stages(*finite, p, spec, contract),
            discrete("experts of the zero token", chosen[ZERO : ZERO + 1], lowest_first(zero, spec)),
        ]
        return found if contract.nonfinite != "ieee" else [*found, *_judge_nonfinite(*odd, p, spec)]


class ReplayedVanishing(Degenerate):
    """A routing that is given, of a token whose scores vanish, too."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: those that add an epsilon to the sum of the scores."""
        return tuple(name for name in super().presets() if preset(name).router.normalize_epsilon)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the vanishing token and the ordinary ones."""
        arrays, spec = super().inputs(p), preset(p.preset).router
        x = arrays["x_TD"][VANISHING:]
        experts = make.choices(p.seed, "degenerate", len(x), spec.num_experts, spec.top_k)
        return {**arrays, "x_TD": x, "experts_TK": experts}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        given = tensors["x_TD"], tensors["gate_ED"], self.router(p), tensors.get("bias_E")
        return fields_of(ops.route(*given, experts_TK=tensors["experts_TK"]), "Routing")

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        return judge_stages(inputs, outputs, p, spec, contract)


OFF = np.float32(-1e30)
"""What -inf is judged as: below every other bias, and with an error that is finite."""


class MaskedExperts(TopkSet):
    """Experts that a bias of -inf switches off."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: those that add a bias."""
        return tuple(name for name in super().presets() if preset(name).router.selection_bias)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: a quarter of the experts, which are among the best as others are, and a whole group."""
        arrays, spec = router_arrays(p, "router"), preset(p.preset).router
        off = make.permutation(p.seed, "masked/experts", spec.num_experts) % 4 == 0
        off[make.permutation(p.seed, "masked/group", spec.num_groups)[0] * spec.group_size :][: spec.group_size] = True
        bias = arrays["bias_E"] - np.float32(20)
        return {**arrays, "bias_E": np.where(off, np.float32(-np.inf), bias)}

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        bias = np.maximum(inputs["bias_E"], OFF)
        return super().findings({**inputs, "bias_E": bias}, outputs, p, spec, contract)


def _judge_nonfinite(inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec) -> list[Finding]:
    logits, chosen = outputs["logits_TE"], outputs["experts_TK"]
    with_infinity = wide(inputs["x_TD"]) @ wide(inputs["gate_ED"]).T
    with_infinity[INFINITE][np.isnan(logits[INFINITE])] = np.nan
    scores = scores_of(logits, spec, level(logits.size))
    weights = weights_of(scores, chosen, spec, weight_storage(spec, p))
    found = [
        exact("logits of tokens that are not finite", logits, with_infinity),
        judge("scores of tokens that are not finite", outputs["scores_TE"], scores),
        judge("weights of tokens that are not finite", outputs["weights_TK"], weights),
    ]
    if spec.score == "sigmoid":  # its scores are 0 and 1
        own = Bounded(*(side[INFINITE:] for side in (scores.value, scores.bound, scores.var)))
        found.append(judge_routing(chosen[INFINITE:], own, inputs, spec, "the infinite token's experts"))
    return found


TIE_ORDER = TieOrder(
    "router.tie_order", "router", ("route",),
    "Integer logits, exact in every dtype, most of them tied: the experts must be the oracle's, in its order, by "
    "descending score and ties to the lower index (ONNX TopK defines the same; pytorch#127196, torchtitan#3336 are "
    "what happens otherwise).",
)  # fmt: skip
CASES = (
    TIE_ORDER,
    Untrained("router.ties_untrained", TIE_ORDER, ROUTING, modes=IN_SERVICE, only=("ling-lite", "ling-2.0-mini")),
    CloseScores(
        "router.close_scores", "router", ("route",),
        "Logits that are exact in every dtype and so close that their scores differ in float32 and are mostly equal in "
        "16 bits: a choice among rounded scores (megatron-core's, whose softmax is in the logits' dtype) takes others.",
    ),
    Degenerate(
        "router.degenerate", "router", ("route",),
        "A NaN, an infinite, a zero, two huge and a vanishing token among ordinary ones: experts are distinct and in "
        "range for all; logits, scores, set and weights of the finite ones are judged as ever, down to scores as small "
        "as the epsilon; the zero token's ties go to the lower index (torch-xpu-ops#4839, vllm PR#39391). Of the NaN, "
        "logits, scores and weights are NaN. Of the infinity, logits are infinite or NaN; a softmax of them is NaN, a "
        "sigmoid 1 or 0, so that the set is judged, too; a softmax's choice is open.",
    ),
    ReplayedVanishing(
        "router.replayed_vanishing", "router", ("route",),
        "A routing that is given, where one token's scores are as small as the epsilon that is added to their sum: "
        "weights of a replay are normalised as those of a choice are.",
    ),
    MaskedExperts(
        "router.masked_experts", "router", ("route",),
        "As router.topk_set, with a bias around -20, and one of -inf for a quarter of the experts and all of a group: "
        "they are never chosen, and the bias of the others counts however large it is.",
    ),
)  # fmt: skip
