# SPDX-License-Identifier: Apache-2.0
"""Judging a layer, wherever it is found: alone, or inside a model.

The routing is judged first; everything after it is conditional on the device's own choice, logits and weights, since
two right devices may choose differently where the margin is open. The rest is a black box: variances are chained
through it.
"""

from __future__ import annotations

from hal.contract import Contract
from hal.moe.model_spec import MoEModelSpec
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import gate_storage, weight_storage
from hal_conformance.cases.router import judge_stages
from hal_conformance.cases.weight_gradients import WeightGradients
from hal_conformance.numerics.detectors import Finding, judge
from hal_conformance.oracle.dispatching import sent
from hal_conformance.oracle.layer import layer
from hal_conformance.oracle.losses import aux_loss, z_loss


def judge_layer(
    given: Arrays,
    got: Arrays,
    model: MoEModelSpec,
    p: Params,
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
        p: of the case; its dtype is that of the activations.
        contract: of the device.
        capacity: most rows of an expert.
        backward: whether the gradients are judged, too.
    """
    spec, dtype, tokens = model.router, p.dtype, len(given["x_TD"])
    found = judge_stages(given, got, p, spec, contract)
    found.append(judge("z_loss", got["z_loss"], z_loss(got["logits_TE"])[0]))
    if any(f.status.colour == "red" for f in found):
        return found
    found.append(judge("aux_loss", got["aux_loss"], aux_loss(got["scores_TE"], got["experts_TK"], spec)[0]))
    _, counts_E = sent(got["experts_TK"], spec.num_experts, capacity)
    weights = WeightGradients(got, counts_E, dtype) if backward else None
    expected = layer(
        given, got, model, dtype, gate_storage(spec, p), weight_storage(spec, p), contract,
        capacity=capacity, on_experts=None if weights is None else weights.add,
    )  # fmt: skip
    found.append(judge("y", got["y_TD"], expected.y.bounded(dtype), independent=tokens))
    for name, gradient in expected.gradients.items():
        # Independent errors: one for each token; every token has a part in every element of a weight's gradient.
        free = tokens if name == "x_TD" else 1
        bound = gradient.bounded(gate_storage(spec, p) if name == "gate_ED" else dtype)
        found.append(judge(f"d{name}", got[f"d{name}"], bound, independent=free))
    return found if weights is None else [*found, *weights.findings()]
