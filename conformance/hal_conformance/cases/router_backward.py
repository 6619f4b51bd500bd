# SPDX-License-Identifier: Apache-2.0
"""The router backward: gradients of the activations and the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Params, arithmetic
from hal_conformance.cases.base import (
    KINDS,
    fields_of,
    gate_storage,
    keeps_nonfinite,
    leaf,
    nothing_trained,
    observed,
    part,
    router_arrays,
    run_backward,
    weight_storage,
)
from hal_conformance.cases.frozen import Frozen
from hal_conformance.cases.kept_graph import KeptGraph
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.narrow import Int32, SmallIntegers
from hal_conformance.cases.router import ROUTING, RouterCase, expected_structure, judge_routing, judge_stages
from hal_conformance.cases.sized import FEW_EXPERTS, Aligned, Long, Many, TokenCounts, Unaligned, Whole, Wide
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.chained import Chained, product
from hal_conformance.numerics.detectors import exact, joined, judge, merge, structure
from hal_conformance.oracle.routing import logits_gradient, scores_of, stored_logits_gradient
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

    from hal_conformance.numerics.detectors import Finding


@dataclass(frozen=True)
class Backward(RouterCase):
    """From the gradients of what `route` returns back to the activations and the gate.

    Attributes:
        replayed: whether the experts are given.
        upstream: what of the `Routing` has a gradient: the weights, or all three.
    """

    replayed: bool = False
    upstream: tuple[str, ...] = ("weights_TK",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        spec, arrays = self.router(p), router_arrays(p, "router")
        tokens = len(arrays["x_TD"])
        if self.replayed:
            arrays["experts_TK"] = make.choices(p.seed, "router", tokens, spec.num_experts, spec.top_k)
        of = {
            "weights_TK": (spec.top_k, 1.0, weight_storage(spec, p)),
            "scores_TE": (spec.num_experts, 1.0, "float32"),
            # An eighth: as large as what comes through the scores, whose slopes are small.
            "logits_TE": (spec.num_experts, 0.125, gate_storage(spec, p)),
        }
        for name in self.upstream:
            width, size, storage = of[name]
            gradient = make.normal(p.seed, f"router/d{name.partition('_')[0]}", tokens, width) * size
            arrays[f"d{name}"] = make.store(gradient, storage)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `frozen.Trainable`."""
        return ("x_TD", "gate_ED")

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """See `frozen.Trainable`."""
        replay = {"experts_TK": tensors["experts_TK"]} if self.replayed else {}
        spec, bias = self.router(p), tensors.get("bias_E")
        routing = fields_of(ops.route(tensors["x_TD"], tensors["gate_ED"], spec, bias, **replay), "Routing")
        upstream = {name: tensors[f"d{name}"] for name in self.upstream if f"d{name}" in tensors}
        run_backward(routing, upstream if factor == 1.0 else {name: factor * d for name, d in upstream.items()})
        return routing

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """See `frozen.Trainable`."""
        spec, x, gate = self.router(p), inputs["x_TD"], inputs["gate_ED"]
        gradients = {"dx_TD": (x.shape, p.dtype), "dgate_ED": (gate.shape, gate_storage(spec, p))}
        return structure(outputs, expected_structure(spec, p, len(x)) | gradients)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        found = self.forward(inputs, outputs, p, contract)
        if any(finding.status.colour == "red" for finding in found):
            return merge(found)
        return merge([*found, *self.backward(inputs, outputs, p, contract)])

    def forward(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """Judge the routing."""
        return judge_stages(inputs, outputs, p, self.router(p), contract)

    def backward(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """Judge the gradients."""
        spec, x = self.router(p), inputs["x_TD"]
        storage = gate_storage(spec, p)
        dlogits = self.dlogits(inputs, outputs, p)
        dgate = product(dlogits.T, Chained.exact(x), arithmetic(contract, storage)).stored(storage)
        return [
            self.judge_dx(inputs, outputs, p, contract, dlogits),
            judge("dgate", outputs["dgate_ED"], dgate.bounded(storage), independent=1),
        ]

    def dlogits(self, inputs: Arrays, outputs: Arrays, p: Params) -> Chained:
        """Return the gradient of the logits, stored."""
        spec, logits = self.router(p), outputs["logits_TE"]
        storage, scores = gate_storage(spec, p), scores_of(logits, spec, level(logits.size))
        chosen = outputs["experts_TK"]
        upstream = {name: Chained.exact(inputs[f"d{name}"]) for name in self.upstream}
        if len(upstream) == 1:
            return logits_gradient(upstream["weights_TK"], scores, chosen, spec).stored(storage)
        return stored_logits_gradient(
            upstream["weights_TK"], scores, chosen, spec, storage, upstream["scores_TE"], upstream["logits_TE"]
        )

    def judge_dx(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract, dlogits: Chained) -> Finding:
        """Judge the gradient of the activations."""
        storage, got = gate_storage(self.router(p), p), outputs["dx_TD"]
        dx = product(dlogits, Chained.exact(inputs["gate_ED"]), arithmetic(contract, storage)).stored(storage)
        return judge("dx", got, dx.stored(p.dtype).bounded(p.dtype), independent=len(got))


class Forward(Backward):
    """The routing alone."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        with nothing_trained():
            return observed(self.there_and_back(ops, tensors, p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, expected_structure(self.router(p), p, len(inputs["x_TD"])))
        return wrong or merge(self.forward(inputs, outputs, p, contract))


class OneUpstream(Backward):
    """A gradient of the weights, of the scores, and of the logits, each alone: three passes."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: a softmax, and a sigmoid with a bias."""
        return KINDS[:2]

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: a bias may require a gradient, and has none, or zeros."""
        others = {name: tensor for name, tensor in tensors.items() if name.removeprefix("d") not in self.upstream}
        found: dict[str, torch.Tensor] = {}
        for name in self.upstream:
            alone = {**others, f"d{name}": tensors[f"d{name}"]}
            if "bias_E" in tensors:
                alone["bias_E"] = leaf(tensors["bias_E"])
            outputs = super().run(ops, alone, p)
            if "bias_E" in alone and alone["bias_E"].grad is not None:
                outputs["dbias_E"] = alone["bias_E"].grad
            found |= {f"{name}/{output}": tensor for output, tensor in outputs.items()}
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        zeros = {f"d{name}": np.zeros_like(inputs[f"d{name}"]) for name in self.upstream}
        found: dict[str, Judgement] = {}
        for name in self.upstream:
            got = part(outputs, name)
            given = {**inputs, **zeros, f"d{name}": inputs[f"d{name}"]}
            found[f"{name} alone"] = super().judge(given, got, p, contract)
            if "dbias_E" in got:
                bias = inputs["bias_E"]
                wrong = structure(got, {"dbias_E": (bias.shape, "float32")})
                found[f"bias, {name} alone"] = wrong or merge([exact("dbias", got["dbias_E"], np.zeros_like(bias))])
        return joined(found)


FORWARD, UPSTREAM = 0, 1
"""Tokens of `NanBackward`: one that is NaN, and one whose weights have a gradient of NaN."""


class NanBackward(Backward):
    """NaN in one token, and in the gradient of another."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return KINDS

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        for name, token in (("x_TD", FORWARD), ("dweights_TK", UPSTREAM)):
            arrays[name] = arrays[name].copy()
            arrays[name][token, 1] = np.nan
        return arrays

    def forward(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Backward.forward`: which experts is all that the gradients need."""
        keeps_nonfinite(contract)
        spec, logits = self.router(p), outputs["logits_TE"]
        return [judge_routing(outputs["experts_TK"], scores_of(logits, spec, level(logits.size)), inputs, spec)]

    @np.errstate(all="ignore")
    def backward(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Backward.backward`: of the gate, which sums over tokens, the experts that the two have chosen are NaN.

        The others may be: a softmax hands a chosen expert's NaN to all, a sigmoid does not.
        """
        chosen = outputs["experts_TK"][[FORWARD, UPSTREAM]].reshape(-1)
        dgate = outputs["dgate_ED"][chosen]
        nan: F64 = np.full(dgate.shape, np.nan)
        return [
            self.judge_dx(inputs, outputs, p, contract, self.dlogits(inputs, outputs, p)),
            exact("dgate of the experts of NaN", dgate, nan),
        ]


_NEEDS = ("route",)
BACKWARD = Backward(
    "router.backward", "router", _NEEDS,
    "Gradients of activations and gate from those of the weights, the scores (of which the balance loss is made) and "
    "the logits (the z-loss) together, through normalisation and softmax or sigmoid; also the four results themselves. "
    "Bound: chained variances (oracle.routing.stored_logits_gradient).",
    upstream=("weights_TK", "scores_TE", "logits_TE"),
)  # fmt: skip
REPLAYED = Backward(
    "router.replayed", "router", _NEEDS,
    "A routing that is given: these experts in this order, weights computed anew, and the gradients from those of "
    "the weights alone.",
    replayed=True,
)  # fmt: skip
CASES = (
    BACKWARD,
    REPLAYED,
    OneUpstream(
        "router.one_upstream", "router", _NEEDS,
        "As router.backward, and three backward passes, of the weights alone, the scores alone and the logits alone. A "
        "selection bias that requires a gradient has none, or zeros: it never reaches the weights.",
        upstream=("weights_TK", "scores_TE", "logits_TE"),
    ),
    NanBackward(
        "router.nan_backward", "router", _NEEDS,
        "One token of NaN, and a gradient of NaN for the weights of another: they reach their own activations' "
        "gradients, and the gate's, which sums over tokens; the gradients of all other tokens are judged as "
        "in router.replayed.",
    ),
    Strided("router.strided", BACKWARD, only=KINDS[:2]), Sliced("router.sliced", BACKWARD, only=KINDS[1:2]),
    TokenCounts("router.token_counts", BACKWARD, only=FEW_EXPERTS),
    Shifted("router.shifted", BACKWARD, only=FEW_EXPERTS),
    Untrained(
        "router.replayed_untrained",
        Forward("router.replayed", "router", _NEEDS, "Weights of the experts that are given.", replayed=True),
        ROUTING, modes=IN_SERVICE, only=KINDS[:2],
    ),
    Frozen("router.frozen", BACKWARD, only=KINDS[:2]), Frozen("router.frozen_replayed", REPLAYED),
    Aligned("router.aligned", BACKWARD, only=KINDS[:2]),
    Many("router.many", BACKWARD, only=FEW_EXPERTS),
    Long("router.long", BACKWARD, only=FEW_EXPERTS),
    Unaligned("router.unaligned", BACKWARD, only=FEW_EXPERTS),
    Wide("router.wide", BACKWARD, only=KINDS[:2]),
    Whole("router.whole", BACKWARD, only=KINDS[:2]),
    Tails("router.tails", BACKWARD, only=FEW_EXPERTS),
    KeptResults("router.kept", BACKWARD, only=KINDS[1:3]),
    Int32("router.int32", REPLAYED, only=FEW_EXPERTS),
    SmallIntegers("router.small_integers", REPLAYED, only=FEW_EXPERTS),
    KeptGraph("router.kept_graph", BACKWARD, only=KINDS[1:2]),
)  # fmt: skip
