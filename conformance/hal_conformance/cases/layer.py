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
    leaf,
    mean_load,
    model_of,
    observed,
    router_arrays,
    shape,
    weight_storage,
    wide,
)
from hal_conformance.cases.experts import WeightGradients
from hal_conformance.cases.router import expected_structure, judge_routing
from hal_conformance.cases.strided import Strided
from hal_conformance.detectors import Finding, discrete, exact, judge, merge, structure
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
        backward: whether the gradients are judged, too: those of y, and of both losses.
        capacity: whether the busier experts drop rows.
        only: the presets that show all there is to see; empty: every one.
    """

    replayed: bool = False
    backward: bool = False
    capacity: bool = False
    only: tuple[str, ...] = ()

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return self.only or super().presets()

    def limit(self, p: Params) -> int | None:
        """Return the most rows of an expert: the mean load, rounded up, or None."""
        return mean_load(p) if self.capacity else None

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
            gate_projection = name == ROUTED[0]
            arrays[name] = make.expert_weights(
                p.seed, f"layer/{name}", p.dtype, spec.num_experts, *sizes, gate=gate_projection
            )
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
            # Of the losses' gradients: large enough to matter beside that of y.
            arrays["daux"], arrays["dz"] = (np.asarray(share * s.tokens, np.float32) for share in (1.0, 0.25))
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        from hal.moe.ops import ExpertWeights, LayerWeights

        leaves, names = dict(tensors), trained(tensors)
        if self.backward:
            leaves |= {name: leaf(tensors[name]) for name in names}
        weights = LayerWeights(
            leaves["gate_ED"],
            leaves.get("bias_E"),
            ExpertWeights(*(leaves[name] for name in ROUTED)),
            tuple(leaves[name] for name in SHARED) if SHARED[0] in leaves else None,  # type: ignore[arg-type]
            leaves.get(SHARED_GATE),
        )
        limit = {"capacity": self.limit(p)} if self.capacity else {}
        out = ops.layer(leaves["x_TD"], weights, model_of(p), experts_TK=leaves.get("experts_TK"), **limit)
        result = {"y_TD": out.y_TD, "aux_loss": out.aux_loss, "z_loss": out.z_loss, **out.routing._asdict()}
        if self.backward:
            upstream = [tensors[name] for name in ("dy_TD", "daux", "dz")]
            torch.autograd.backward([out.y_TD, out.aux_loss, out.z_loss], upstream)
            result |= {f"d{name}": leaves[name].grad for name in names}
        return observed(result)

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
        _, counts_E = sent(outputs["experts_TK"], spec.num_experts, self.limit(p))
        weights = WeightGradients(outputs, counts_E, p.dtype) if self.backward else None
        expected = layer(
            inputs, outputs, model, p.dtype, gate_storage(spec, p), weight_storage(spec, p), contract,
            capacity=self.limit(p), on_expert=None if weights is None else weights.add,
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
            found.append(judge_routing(chosen, scores, inputs, spec))
        if not any(f.status.colour == "red" for f in found):
            expected = weights_of(scores, chosen, spec, weight_storage(spec, p))
            found.append(judge("weights", outputs["weights_TK"], expected))
            found.append(judge("aux_loss", outputs["aux_loss"], aux_loss(outputs["scores_TE"], chosen, spec)[0]))
        return found


class NanToken(Layer):
    """A token that is NaN; so are the losses, which are means over all tokens."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        x = arrays["x_TD"].copy()
        x[len(x) // 2] = np.nan
        return {**arrays, "x_TD": x}


class NoTokens(Layer):
    """Zero tokens."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        return {**arrays, "x_TD": arrays["x_TD"][:0]}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the structure, and losses of zero."""
        x, spec = inputs["x_TD"], model_of(p).router
        losses = dict.fromkeys(("aux_loss", "z_loss"), ((), "float32"))
        wrong = structure(outputs, expected_structure(spec, p, 0) | {"y_TD": (x.shape, p.dtype), **losses})
        return wrong or merge(exact(name, outputs[name], np.zeros((), np.float32)) for name in losses)


_NEEDS = ("layer",)
KINDS = ("ling-lite", "deepseek-v3", "mixtral-8x7b", "qwen2-moe")
"""One router of each kind: softmax with shared experts, sigmoid with groups and a bias, none shared, a shared gate."""
_GIVEN = "a replayed routing"
_FREE = "the device's own routing, certified by margin and then taken as given"
_GRADIENTS = "y, and the gradients of x, the gate, the experts and the shared experts from those of y and both losses"


def _what(how: str, what: str) -> str:
    return (
        f"A whole layer with {how}: logits, scores, weights, both losses, {what}. Bound: chained variances, lambda "
        "deviations and half an ulp."
    )


BACKWARD = Layer(
    "layer.backward_replayed", "layer", _NEEDS, _what(_GIVEN, _GRADIENTS), replayed=True, backward=True
)  # fmt: skip
CASES = (
    Layer("layer.forward_replayed", "layer", _NEEDS, _what(_GIVEN, "y"), replayed=True),
    Layer("layer.forward_free", "layer", _NEEDS, _what(_FREE, "y")),
    BACKWARD,
    Layer("layer.backward_free", "layer", _NEEDS, _what(_FREE, _GRADIENTS), backward=True),
    Layer(
        "layer.capacity", "layer", _NEEDS, _what(f"{_GIVEN}, where the busier experts drop rows", _GRADIENTS),
        replayed=True, backward=True, capacity=True, only=KINDS,
    ),
    NanToken(
        "layer.nan_token", "layer", _NEEDS, _what(f"{_FREE}, and one token of NaN, which stays alone", "y"), only=KINDS
    ),
    NoTokens("layer.no_tokens", "layer", _NEEDS, "A layer without tokens: empty results, losses of zero.", only=KINDS),
    Strided("layer.strided", BACKWARD),
)  # fmt: skip
