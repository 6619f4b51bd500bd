# SPDX-License-Identifier: Apache-2.0
"""The router: logits, scores, the chosen set, weights, tie order, degenerate rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.bounds import Bounded, matmul
from hal_conformance.budget import level
from hal_conformance.case import F64, I64, Arrays, Params, arithmetic
from hal_conformance.cases.base import (
    Base,
    gate_storage,
    leaf,
    observed,
    router_arrays,
    shape,
    weight_storage,
    wide,
)
from hal_conformance.cases.strided import Strided
from hal_conformance.chained import Chained, product
from hal_conformance.detectors import Finding, discrete, judge, merge, structure
from hal_conformance.margins import Certainty, certify, judge_choice
from hal_conformance.oracle.routing import logits_gradient, scores_of, weights_of
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


def expected_structure(spec: RouterSpec, p: Params, tokens: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of a `Routing`."""
    return {
        "logits_TE": ((tokens, spec.num_experts), gate_storage(spec, p)),
        "scores_TE": ((tokens, spec.num_experts), "float32"),
        "experts_TK": ((tokens, spec.top_k), "int64"),
        "weights_TK": ((tokens, spec.top_k), weight_storage(spec, p)),
    }


def judge_routing(experts_TK: I64, scores: Bounded, inputs: Arrays, spec: RouterSpec, what: str = "experts") -> Finding:
    """Judge a device's own choice by the margins of its scores, and the case's bias where the router has one."""
    bias = wide(inputs["bias_E"]) if spec.selection_bias else None
    return judge_choice(experts_TK, certify(scores, bias, spec), what)


class RouterCase(Base):
    """A case whose inputs are activations and a gate as they occur."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return router_arrays(p, "router")

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        spec = preset(p.preset).router
        routing = ops.route(tensors["x_TD"], tensors["gate_ED"], spec, tensors.get("bias_E"))
        return dict(routing._asdict())

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        spec = preset(p.preset).router
        wrong = structure(outputs, expected_structure(spec, p, len(inputs["x_TD"])))
        if wrong is not None:
            return wrong
        return merge(self.findings(inputs, outputs, p, spec, contract))

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """Return what the detectors say."""
        raise NotImplementedError


class Logits(RouterCase):
    """The gate's product."""

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        storage = gate_storage(spec, p)
        got = outputs["logits_TE"]
        exact = matmul(wide(inputs["x_TD"]), wide(inputs["gate_ED"]).T, arithmetic(contract, storage), level(got.size))
        return [judge("logits", got, exact.stored(storage), bias=storage != "float32")]


class Scores(RouterCase):
    """softmax or sigmoid of the device's own logits."""

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        got = outputs["scores_TE"]
        return [judge("scores", got, scores_of(outputs["logits_TE"], spec, level(got.size)))]


class TopkSet(RouterCase):
    """The chosen set, certified by margin."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the bias lies around 6.94, as trained ones do (GLM-5.2: 6.82 to 7.06).

        A common offset changes no choice, but bfloat16 has steps of 1/32 there: a bias that passes through it, or
        scores that are added to it in 16 bits, move most tokens (sglang#37133).
        """
        arrays = super().inputs(p)
        if "bias_E" in arrays:
            arrays["bias_E"] = arrays["bias_E"] + np.float32(6.9375)
        return arrays

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        scores = scores_of(outputs["logits_TE"], spec, level(outputs["logits_TE"].size))
        return [judge_routing(outputs["experts_TK"], scores, inputs, spec)]


class Weights(RouterCase):
    """The weights of the device's own choice."""

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        experts_TK = outputs["experts_TK"]
        if experts_TK.size and (experts_TK.min() < 0 or experts_TK.max() >= spec.num_experts):
            return [Finding(Status.FAIL_DISCRETE, detail="an expert is out of range")]
        scores = scores_of(outputs["logits_TE"], spec, level(outputs["logits_TE"].size))
        return [judge("weights", outputs["weights_TK"], weights_of(scores, experts_TK, spec, weight_storage(spec, p)))]


# Logits 0..3 only: their sigmoids have no two equal sums of pairs, so that groups tie only where their pairs do.
TIED_LOGITS = 4


class TieOrder(RouterCase):
    """Exact ties go to the lower index."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: one-hot tokens and integer weights, so that every logit is exact and most tie."""
        spec, s = preset(p.preset).router, shape(p)
        hot = np.zeros((s.tokens, s.width))
        hot[np.arange(s.tokens), np.arange(s.tokens) % s.width] = 1.0
        gate = make.integers(p.seed, "tie/gate", 0, TIED_LOGITS - 1, spec.num_experts, s.width)
        arrays = {"x_TD": make.store(hot, p.dtype), "gate_ED": make.store(gate, gate_storage(spec, p))}
        if spec.selection_bias:
            arrays["bias_E"] = np.zeros(spec.num_experts, np.float32)
        return arrays

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


class NegativeScores(TopkSet):
    """Selection scores below zero."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: those that add a bias."""
        return tuple(name for name in super().presets() if preset(name).router.selection_bias)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the bias lies around -1, below every sigmoid."""
        arrays = router_arrays(p, "router")
        arrays["bias_E"] = arrays["bias_E"] - np.float32(1.0625)
        return arrays


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
        x[INFINITE, 5] = np.inf
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

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`: distinct and in range for all; for finite tokens everything as ever."""
        storage, experts_TK = gate_storage(spec, p), outputs["experts_TK"]
        everyone = np.ones((len(experts_TK), spec.num_experts), bool)
        found = [judge_choice(experts_TK, Certainty(~everyone, everyone))]
        if found[0].status.colour == "red":
            return found
        finite = slice(ZERO, None)
        x, gate, logits = wide(inputs["x_TD"][finite]), wide(inputs["gate_ED"]), outputs["logits_TE"][finite]
        at = level(logits.size)
        scores = scores_of(logits, spec, at)
        weights = weights_of(scores, experts_TK[finite], spec, weight_storage(spec, p))
        zero = np.zeros((1, spec.num_experts))
        return [
            judge("logits", logits, matmul(x, gate.T, arithmetic(contract, storage), at).stored(storage)),
            judge("scores", outputs["scores_TE"][finite], scores),
            judge_routing(experts_TK[finite], scores, inputs, spec, "finite tokens' experts"),
            judge("weights", outputs["weights_TK"][finite], weights),
            discrete("experts of the zero token", experts_TK[ZERO : ZERO + 1], lowest_first(zero, spec)),
        ]


class NoTokens(RouterCase):
    """Zero tokens."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        return {**arrays, "x_TD": arrays["x_TD"][:0]}

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`: the structure is all there is."""
        return [Finding(Status.EXACT)]


@dataclass(frozen=True)
class Backward(RouterCase):
    """The gradient of the weights, back to the activations and the gate.

    Attributes:
        replayed: whether the experts are given.
    """

    replayed: bool = False

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        spec, arrays = preset(p.preset).router, router_arrays(p, "router")
        tokens = len(arrays["x_TD"])
        if self.replayed:
            arrays["experts_TK"] = make.choices(p.seed, "router", tokens, spec.num_experts, spec.top_k)
        dweights = make.normal(p.seed, "router/dweights", tokens, spec.top_k)
        arrays["dweights_TK"] = make.store(dweights, weight_storage(spec, p))
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        x, gate = leaf(tensors["x_TD"]), leaf(tensors["gate_ED"])
        replay = {"experts_TK": tensors["experts_TK"]} if self.replayed else {}
        routing = ops.route(x, gate, preset(p.preset).router, tensors.get("bias_E"), **replay)
        routing.weights_TK.backward(tensors["dweights_TK"])
        return observed({**routing._asdict(), "dx_TD": x.grad, "dgate_ED": gate.grad})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        spec, x, gate = preset(p.preset).router, inputs["x_TD"], inputs["gate_ED"]
        storage = gate_storage(spec, p)
        wrong = structure(
            outputs,
            expected_structure(spec, p, len(x)) | {"dx_TD": (x.shape, p.dtype), "dgate_ED": (gate.shape, storage)},
        )
        if wrong is not None:
            return wrong
        logits, chosen = outputs["logits_TE"], outputs["experts_TK"]
        scores = scores_of(logits, spec, level(logits.size))
        if self.replayed:
            choice = discrete("replayed experts", chosen, inputs["experts_TK"])
        else:
            choice = judge_routing(chosen, scores, inputs, spec)
        if choice.status.colour == "red":
            return merge([choice])
        rule = arithmetic(contract, storage)
        upstream = Chained.exact(inputs["dweights_TK"])
        dlogits = logits_gradient(upstream, scores, chosen, spec).stored(storage)
        dx = product(dlogits, Chained.exact(gate), rule).stored(storage)
        dgate = product(dlogits.T, Chained.exact(x), rule)
        expected = weights_of(scores, chosen, spec, weight_storage(spec, p))
        return merge(
            [
                choice,
                judge("weights", outputs["weights_TK"], expected),
                judge("dx", outputs["dx_TD"], dx.stored(p.dtype).bounded(p.dtype), independent=len(x)),
                judge("dgate", outputs["dgate_ED"], dgate.stored(storage).bounded(storage), independent=1),
            ]
        )


LOGITS = Logits(
    "router.logits", "router", ("route",),
    "The gate's product, against float64. Bound: the random-walk bound of a sum of D products in any order, plus half "
    "an ulp of the gate's dtype (bounds.matmul). Also the RMS ratio and, where the logits are rounded, the bias.",
)  # fmt: skip
SCORES = Scores(
    "router.scores", "router", ("route",),
    "Softmax or sigmoid of the device's own logits. Bound: 2 ulp of exp, the rounding of x - max, the summation with "
    "its stagnation term, a division (bounds.softmax, bounds.sigmoid).",
)  # fmt: skip
TOPK_SET = TopkSet(
    "router.topk_set", "router", ("route",),
    "The chosen experts, from the device's own logits. Where the gap between scores exceeds their bound, at the "
    "level of groups too, the set and its order must be the oracle's; elsewhere any set that scores within the bound "
    "can produce is right: PASS-AMBIGUOUS.",
)  # fmt: skip
WEIGHTS = Weights(
    "router.weights", "router", ("route",),
    "The weights of the device's own choice: gathered, normalised and scaled as the router's equations say, never from "
    "biased scores. Bound: the scores' relative errors and K + 4 roundings.",
)  # fmt: skip
TIE_ORDER = TieOrder(
    "router.tie_order", "router", ("route",),
    "Integer logits, exact in every dtype, most of them tied: the experts must be the oracle's, in its order, by "
    "descending "
    "score and ties to the lower index (ONNX TopK defines the same; pytorch#127196, torchtitan#3336 are what happens "
    "otherwise).",
)  # fmt: skip
NEGATIVE_SCORES = NegativeScores(
    "router.negative_scores", "router", ("route",),
    "As router.topk_set, with a bias around -1: every selection score is negative, so that an expert of a group that "
    "is masked with 0.0 instead of -inf would win (vllm PR#13474).",
)  # fmt: skip
DEGENERATE = Degenerate(
    "router.degenerate", "router", ("route",),
    "A NaN, an infinite, a zero, two huge and a vanishing token among ordinary ones: experts are distinct and in range "
    "for all; logits, scores, set and weights of the finite ones are judged as ever, down to scores as small as the "
    "epsilon; the zero token's ties go to the lower index (torch-xpu-ops#4839, vllm PR#39391).",
)  # fmt: skip
NO_TOKENS = NoTokens("router.no_tokens", "router", ("route",), "Zero tokens: empty results of the right dtypes.")
BACKWARD = Backward(
    "router.backward", "router", ("route",),
    "Gradients of activations and gate from that of the weights, through normalisation and softmax or sigmoid. Bound: "
    "chained variances (oracle.routing.logits_gradient).",
)  # fmt: skip
REPLAYED = Backward(
    "router.replayed", "router", ("route",),
    "A routing that is given: these experts in this order, weights computed anew, and the gradients.",
    replayed=True,
)  # fmt: skip

CASES = (
    LOGITS, SCORES, TOPK_SET, NEGATIVE_SCORES, WEIGHTS, TIE_ORDER, DEGENERATE, NO_TOKENS, BACKWARD, REPLAYED,
    Strided("router.strided", LOGITS),
)  # fmt: skip
