# SPDX-License-Identifier: Apache-2.0
"""The router forward: logits, scores, the chosen set, weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal.moe.router_spec import RouterSpec
from hal_conformance.case import I64, Arrays, Params, arithmetic
from hal_conformance.cases.base import KINDS, Base, fields_of, gate_storage, router_arrays, weight_storage, wide
from hal_conformance.cases.untrained import Untrained
from hal_conformance.numerics.bounds import Bounded, matmul
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.detectors import Finding, discrete, judge, merge, structure
from hal_conformance.numerics.margins import Certainty, certify, judge_choice
from hal_conformance.oracle.routing import scores_between, scores_of, weights_of
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


ROUTING = ("logits_TE", "scores_TE", "experts_TK", "weights_TK")
"""The fields of a `Routing`."""


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


def expected_logits(inputs: Arrays, p: Params, spec: RouterSpec, contract: Contract) -> Bounded:
    """Return the gate's product, stored."""
    x, gate, storage = wide(inputs["x_TD"]), wide(inputs["gate_ED"]), gate_storage(spec, p)
    return matmul(x, gate.T, arithmetic(contract, storage), level(len(x) * len(gate))).stored(storage)


def certain_choice(inputs: Arrays, p: Params, spec: RouterSpec, contract: Contract) -> Certainty:
    """Return what is certain of each token's experts before any device has run: from bounds of logits and scores."""
    logits = expected_logits(inputs, p, spec, contract)
    scores = scores_between(logits, spec, level(logits.value.size))
    return certify(scores, wide(inputs["bias_E"]) if spec.selection_bias else None, spec)


def judge_stages(inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract) -> list[Finding]:
    """Judge a whole `Routing`, each stage from the device's own input to it; the choice may be a replayed one."""
    logits, chosen = outputs["logits_TE"], outputs["experts_TK"]
    scores = scores_of(logits, spec, level(logits.size))
    if "experts_TK" in inputs:
        choice = discrete("replayed experts", chosen, inputs["experts_TK"])
    else:
        choice = judge_routing(chosen, scores, inputs, spec)
    found = [
        judge("logits", logits, expected_logits(inputs, p, spec, contract)),
        judge("scores", outputs["scores_TE"], scores),
        choice,
    ]
    if choice.status.colour == "red":
        return found
    weights = weights_of(scores, chosen, spec, weight_storage(spec, p))
    return [*found, judge("weights", outputs["weights_TK"], weights)]


class RouterCase(Base):
    """A case whose inputs are activations and a gate as they occur."""

    def router(self, p: Params) -> RouterSpec:
        """Return the router's equations."""
        return preset(p.preset).router

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return router_arrays(p, "router")

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        routing = ops.route(tensors["x_TD"], tensors["gate_ED"], self.router(p), tensors.get("bias_E"))
        return fields_of(routing, "Routing")

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        spec = self.router(p)
        wrong = structure(outputs, expected_structure(spec, p, len(inputs["x_TD"])))
        if wrong is not None:
            return wrong
        return merge(self.findings(inputs, outputs, p, spec, contract))

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """Return what the detectors say: of every stage, unless a case asks about one."""
        return judge_stages(inputs, outputs, p, spec, contract)


class Logits(RouterCase):
    """The gate's product."""

    def findings(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        """See `RouterCase.findings`."""
        storage = gate_storage(spec, p)
        got = outputs["logits_TE"]
        return [judge("logits", got, expected_logits(inputs, p, spec, contract), bias=storage != "float32")]


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

    def choice(self, inputs: Arrays, p: Params, contract: Contract) -> Certainty:
        """See `agreement.Chooses`."""
        return certain_choice(inputs, p, self.router(p), contract)

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
class Few(RouterCase):
    """One token, or one choice: code that drops axes of length one is wrong here.

    Attributes:
        tokens: how many; None: as many as ever.
        choices: K; None: the model's.
    """

    tokens: int | None = None
    choices: int | None = None

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return KINDS

    def router(self, p: Params) -> RouterSpec:
        """See `RouterCase.router`."""
        spec = super().router(p)
        return spec if self.choices is None else replace(spec, top_k=self.choices)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        return {**arrays, "x_TD": arrays["x_TD"][: self.tokens]}


class AllChosen(RouterCase):
    """As many choices as experts: there is nothing to leave out, and an order all the same."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: few experts and a ragged number of them, neither in groups."""
        return ("mixtral-8x7b", "qwen2-moe")

    def router(self, p: Params) -> RouterSpec:
        """See `RouterCase.router`."""
        spec = super().router(p)
        return replace(spec, top_k=spec.num_experts)


CASES = (
    Logits(
        "router.logits", "router", ("route",),
        "The gate's product, against float64. Bound: the random-walk bound of a sum of D products in any order, plus "
        "half an ulp of the gate's dtype (bounds.matmul). Also the RMS ratio and, where the logits are rounded, the "
        "bias.",
    ),
    Scores(
        "router.scores", "router", ("route",),
        "Softmax or sigmoid of the device's own logits. Bound: 2 ulp of exp, the rounding of x - max, the summation "
        "with its stagnation term, a division (bounds.softmax, bounds.sigmoid).",
    ),
    TopkSet(
        "router.topk_set", "router", ("route",),
        "The chosen experts, from the device's own logits. Where the gap between scores exceeds their bound, at the "
        "level of groups too, the set and its order must be the oracle's; elsewhere any set that scores within the "
        "bound can produce is right: PASS-AMBIGUOUS.",
    ),
    NegativeScores(
        "router.negative_scores", "router", ("route",),
        "As router.topk_set, with a bias around -1: every selection score is negative, so that an expert of a group "
        "that is masked with 0.0 instead of -inf would win (vllm PR#13474).",
    ),
    Weights(
        "router.weights", "router", ("route",),
        "The weights of the device's own choice: gathered, normalised and scaled as the router's equations say, never "
        "from biased scores. Bound: the scores' relative errors and K + 4 roundings.",
    ),
    NoTokens("router.no_tokens", "router", ("route",), "Zero tokens: empty results of the right dtypes."),
    Few(
        "router.one_token", "router", ("route",),
        "One token, as in decoding: logits, scores, choice and weights, each from the device's own input to it.",
        tokens=1,
    ),
    Few(
        "router.few_tokens", "router", ("route",), "As router.one_token with five tokens, as in decoding for a few.",
        tokens=5,
    ),
    Few(
        "router.one_choice", "router", ("route",),
        "As router.one_token, with all tokens and K = 1: weights are still normalised and scaled as the router says.",
        choices=1,
    ),
    AllChosen(
        "router.all_chosen", "router", ("route",),
        "As router.one_token, with all tokens and K = E: every expert is chosen, by descending score.",
    ),
    Untrained(
        "router.untrained", RouterCase("router.weights", "router", ("route",), "Every stage is judged."), ROUTING,
        only=KINDS[:2],
    ),
)  # fmt: skip
