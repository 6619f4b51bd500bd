# SPDX-License-Identifier: Apache-2.0
"""A whole layer, forward and backward, with the device's own routing and with a replayed one.

The routing is judged first; everything after it is conditional on the device's own choice, logits and weights, since
two right devices may choose differently where the margin is open. The rest is a black box: variances are chained
through it.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices, S shared width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.bounds import matmul
from hal_conformance.budget import level
from hal_conformance.case import Arrays, Footprint, Params, arithmetic
from hal_conformance.cases.base import (
    Base,
    expert_bytes,
    gate_storage,
    model_of,
    router_arrays,
    shape,
    weight_storage,
    wide,
)
from hal_conformance.cases.experts import WeightGradients
from hal_conformance.cases.router import expected_structure
from hal_conformance.detectors import Finding, discrete, judge, merge, structure
from hal_conformance.margins import certify, judge_choice
from hal_conformance.oracle.dispatching import sent
from hal_conformance.oracle.layer import ROUTED, SHARED, SHARED_GATE, layer
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.oracle.routing import scores_of, weights_of
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


def trained(inputs: dict[str, Any]) -> list[str]:
    """Return the inputs of which a backward pass gives gradients."""
    return [name for name in ("x_TD", "gate_ED", *ROUTED, *SHARED, SHARED_GATE) if name in inputs]


@dataclass(frozen=True)
class Layer(Base):
    """One call of a layer.

    Attributes:
        replayed: whether the experts are given.
        backward: whether the gradients are judged, too.
    """

    replayed: bool = False
    backward: bool = False

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint(expert_bytes(p), expert_bytes(p) if self.backward else 0)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        model, s = model_of(p), shape(p)
        spec = model.router
        arrays = router_arrays(p, "layer")
        scale = np.sqrt(s.width) / make.typical_norm(s.width)
        x = make.activations(p.seed, "layer/x", s.tokens, s.width)
        arrays["x_TD"] = make.store(x * scale, p.dtype)
        gate = make.gate(p.seed, "layer/gate", spec.num_experts, s.width) / scale
        arrays["gate_ED"] = make.store(gate, gate_storage(spec, p))
        for name, sizes in zip(ROUTED, ((s.hidden, s.width), (s.hidden, s.width), (s.width, s.hidden)), strict=True):
            arrays[name] = make.expert_weights(p.seed, f"layer/{name}", p.dtype, spec.num_experts, *sizes)
        if model.num_shared_experts:
            width = model.shared_hidden_size
            for name, sizes in zip(SHARED, ((width, s.width), (width, s.width), (s.width, width)), strict=True):
                arrays[name] = make.store(make.weights(p.seed, f"layer/{name}", *sizes), p.dtype)
        if model.shared_gate:
            arrays[SHARED_GATE] = make.store(make.weights(p.seed, "layer/shared_gate", s.width), p.dtype)
        if self.replayed:
            arrays["experts_TK"] = make.choices(p.seed, "layer", s.tokens, spec.num_experts, spec.top_k)
        if self.backward:
            arrays["dy_TD"] = make.store(make.normal(p.seed, "layer/dy", s.tokens, s.width), p.dtype)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        from hal.moe.ops import ExpertWeights, LayerWeights

        leaves, names = dict(tensors), trained(tensors)
        if self.backward:
            leaves |= {name: tensors[name].clone().requires_grad_() for name in names}
        weights = LayerWeights(
            leaves["gate_ED"],
            leaves.get("bias_E"),
            ExpertWeights(*(leaves[name] for name in ROUTED)),
            tuple(leaves[name] for name in SHARED) if SHARED[0] in leaves else None,  # type: ignore[arg-type]
            leaves.get(SHARED_GATE),
        )
        out = ops.layer(leaves["x_TD"], weights, model_of(p), experts_TK=leaves.get("experts_TK"))
        result = {"y_TD": out.y_TD, "aux_loss": out.aux_loss, "z_loss": out.z_loss, **out.routing._asdict()}
        if self.backward:
            out.y_TD.backward(tensors["dy_TD"])
            result |= {f"d{name}": leaves[name].grad for name in names if leaves[name].grad is not None}
        return {name: tensor.detach() for name, tensor in result.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        model = model_of(p)
        x, spec = inputs["x_TD"], model.router
        shapes = expected_structure(spec, p, len(x)) | {
            "y_TD": (x.shape, p.dtype), "aux_loss": ((), "float32"), "z_loss": ((), "float32"),
        }  # fmt: skip
        storage = {name: gate_storage(spec, p) if name == "gate_ED" else p.dtype for name in trained(inputs)}
        if self.backward:
            shapes |= {f"d{name}": (inputs[name].shape, dtype) for name, dtype in storage.items()}
        wrong = structure(outputs, shapes)
        if wrong is not None:
            return wrong
        found = self._routing(inputs, outputs, p, spec, contract)
        if any(f.status.colour == "red" for f in found):
            return merge(found)
        _, counts_E = sent(outputs["experts_TK"], spec.num_experts)
        weights = WeightGradients(outputs, counts_E, p.dtype) if self.backward else None
        expected = layer(
            inputs, outputs, model, p.dtype, gate_storage(spec, p), weight_storage(spec, p), contract,
            on_expert=None if weights is None else weights.add,
        )  # fmt: skip
        found.append(judge("y", outputs["y_TD"], expected.y.bounded(p.dtype), independent=len(x)))
        for name, gradient in expected.gradients.items():
            # Independent errors: one for each token; every token has a part in every element of a weight's gradient.
            free = len(x) if name == "x_TD" else 1
            bound = gradient.bounded(storage[name])
            found.append(judge(f"d{name}", outputs[f"d{name}"], bound, independent=free))
        return merge(found if weights is None else [*found, *weights.findings()])

    def _routing(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        storage = gate_storage(spec, p)
        got, chosen = outputs["logits_TE"], outputs["experts_TK"]
        at = level(got.size)
        exact = matmul(wide(inputs["x_TD"]), wide(inputs["gate_ED"]).T, arithmetic(contract, storage), at)
        scores = scores_of(got, spec, at)
        found = [
            judge("logits", got, exact.stored(storage)),
            judge("scores", outputs["scores_TE"], scores),
            judge("z_loss", outputs["z_loss"], z_loss(got)[0]),
        ]
        if self.replayed:
            found.append(discrete("replayed experts", chosen, inputs["experts_TK"]))
        else:
            bias = wide(inputs["bias_E"]) if spec.selection_bias else None
            found.append(judge_choice(chosen, certify(scores, bias, spec)))
        if not any(f.status.colour == "red" for f in found):
            expected = weights_of(scores, chosen, spec, weight_storage(spec, p))
            found.append(judge("weights", outputs["weights_TK"], expected))
            found.append(judge("aux_loss", outputs["aux_loss"], aux_loss(outputs["scores_TE"], chosen, spec)[0]))
        return found


def _layer(name: str, *, replayed: bool, backward: bool) -> Layer:
    how = "a replayed routing" if replayed else "the device's own routing, certified by margin and then taken as given"
    what = "y and the gradients of x, the gate, the experts and the shared experts" if backward else "y"
    return Layer(
        f"layer.{name}", "layer", ("layer",),
        f"A whole layer with {how}: logits, scores, weights, both losses, {what}. Bound: chained variances, lambda "
        "deviations and half an ulp.",
        replayed=replayed, backward=backward,
    )  # fmt: skip


CASES = (
    _layer("forward_replayed", replayed=True, backward=False),
    _layer("forward_free", replayed=False, backward=False),
    _layer("backward_replayed", replayed=True, backward=True),
    _layer("backward_free", replayed=False, backward=True),
)
