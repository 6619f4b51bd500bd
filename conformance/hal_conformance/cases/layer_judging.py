# SPDX-License-Identifier: Apache-2.0
"""Judging a layer, wherever it is found: alone, or inside a model.

The routing is judged first; everything after it is conditional on the device's own choice, logits and weights, since
two right devices may choose differently where the margin is open. The rest is a black box: variances are chained
through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hal.contract import Contract
from hal.moe.model_spec import MoEModelSpec
from hal_conformance.bounds import matmul
from hal_conformance.budget import level
from hal_conformance.case import Arrays, arithmetic
from hal_conformance.cases.base import wide
from hal_conformance.cases.router import judge_routing
from hal_conformance.detectors import Finding, discrete, judge
from hal_conformance.oracle.dispatching import sent
from hal_conformance.oracle.layer import layer
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.oracle.routing import scores_of, weights_of
from hal_conformance.weight_gradients import WeightGradients


@dataclass(frozen=True)
class Stored:
    """Storage dtypes of a layer: of activations and experts, of the gate and the logits, of the routing weights."""

    model: str
    gate: str
    weights: str

    @classmethod
    def of(cls, model: MoEModelSpec, dtype: str) -> Stored:
        """Return those of a model whose activations have this dtype."""
        spec = model.router
        return cls(
            dtype,
            "float32" if spec.gate_dtype == "float32" else dtype,
            "float32" if spec.weight_dtype == "float32" else dtype,
        )


def judge_layer(
    given: Arrays,
    got: Arrays,
    model: MoEModelSpec,
    dtype: str,
    contract: Contract,
    *,
    capacity: int | None = None,
    backward: bool = False,
) -> list[Finding]:
    """Return what the detectors say about a layer's results, and its gradients.

    Args:
        given: `x_TD`, the weights by name, `bias_E` where the router has one, `experts_TK` where the routing is
            replayed; for the gradients `dy_TD`, `daux` and `dz`.
        got: the fields of a `Routing`, `y_TD`, both losses; for the gradients "d" and the name of what they belong to.
            Shapes and dtypes are right.
        model: the layer.
        dtype: of activations.
        contract: of the device.
        capacity: most rows of an expert.
        backward: whether the gradients are judged, too.
    """
    found = judge_router(given, got, model, dtype, contract)
    if any(f.status.colour == "red" for f in found):
        return found
    storage, tokens = Stored.of(model, dtype), len(given["x_TD"])
    _, counts_E = sent(got["experts_TK"], model.router.num_experts, capacity)
    weights = WeightGradients(got, counts_E, dtype) if backward else None
    expected = layer(
        given, got, model, dtype, storage.gate, storage.weights, contract,
        capacity=capacity, on_expert=None if weights is None else weights.add,
    )  # fmt: skip
    found.append(judge("y", got["y_TD"], expected.y.bounded(dtype), independent=tokens))
    for name, gradient in expected.gradients.items():
        # Independent errors: one for each token; every token has a part in every element of a weight's gradient.
        free = tokens if name == "x_TD" else 1
        bound = gradient.bounded(storage.gate if name == "gate_ED" else dtype)
        found.append(judge(f"d{name}", got[f"d{name}"], bound, independent=free))
    return found if weights is None else [*found, *weights.findings()]


def judge_router(given: Arrays, got: Arrays, model: MoEModelSpec, dtype: str, contract: Contract) -> list[Finding]:
    """Return what the detectors say about logits, scores, choice, weights and losses."""
    spec, storage = model.router, Stored.of(model, dtype)
    logits, chosen = got["logits_TE"], got["experts_TK"]
    at = level(logits.size)
    product = matmul(wide(given["x_TD"]), wide(given["gate_ED"]).T, arithmetic(contract, storage.gate), at)
    scores = scores_of(logits, spec, at)
    found = [
        judge("logits", logits, product.stored(storage.gate)),
        judge("scores", got["scores_TE"], scores),
        judge("z_loss", got["z_loss"], z_loss(logits)[0]),
    ]
    if "experts_TK" in given:
        found.append(discrete("replayed experts", chosen, given["experts_TK"]))
    else:
        found.append(judge_routing(chosen, scores, given, spec))
    if not any(f.status.colour == "red" for f in found):
        found.append(judge("weights", got["weights_TK"], weights_of(scores, chosen, spec, storage.weights)))
        found.append(judge("aux_loss", got["aux_loss"], aux_loss(got["scores_TE"], chosen, spec)[0]))
    return found
