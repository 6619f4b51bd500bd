# SPDX-License-Identifier: Apache-2.0
"""A whole layer, forward and backward, with the device's own routing and with a replayed one.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices, S shared width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import SCALES, Arrays, Footprint, Params, Scale
from hal_conformance.cases.base import (
    KINDS,
    Base,
    Shape,
    expert_bytes,
    fields_of,
    gate_storage,
    leaf,
    mean_load,
    model_of,
    observed,
    part,
    router_arrays,
    run_backward,
    shape,
)
from hal_conformance.cases.composed import Composed
from hal_conformance.cases.experts import routed
from hal_conformance.cases.kept_graph import KeptGraph
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.layer_judging import judge_layer
from hal_conformance.cases.router import ROUTING, expected_structure
from hal_conformance.cases.sized import FEW_EXPERTS, Long, TokenCounts, Unaligned, Whole, Wide
from hal_conformance.cases.strided import Shifted, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.detectors import Finding, exact, joined, merge, structure
from hal_conformance.oracle.layer import ROUTED, SHARED, SHARED_GATE
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

    from hal.moe.ops import LayerOutput


@dataclass(frozen=True)
class Layer(Base):
    """One call of a layer.

    Attributes:
        replayed: whether the experts are given.
        backward: whether the gradients are judged, too: those of y, and of both losses.
        capacity: most rows of an expert, as a multiple of the mean load, rounded up; None: no limit.
        tokens: how many; None: as many as the scale says.
        only: the presets that show all there is to see; empty: every one.
        at_tiny: those of scale tiny; empty: one router of each kind. The cases of the router itself have all of them.
    """

    replayed: bool = False
    backward: bool = False
    capacity: int | None = None
    tokens: int | None = None
    only: tuple[str, ...] = ()
    at_tiny: tuple[str, ...] = ()

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return self.only or super().presets()

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`."""
        return SCALES if preset in (self.at_tiny or self.only or KINDS) else SCALES[1:]

    def limit(self, p: Params) -> int | None:
        """Return the most rows of an expert, or None."""
        return None if self.capacity is None else self.capacity * mean_load(p)

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the inputs of which a backward pass gives gradients."""
        return tuple(name for name in ("x_TD", "gate_ED", *ROUTED, *SHARED, SHARED_GATE) if name in inputs)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint(expert_bytes(p), expert_bytes(p) if self.backward else 0)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        model, s = model_of(p), shape(p)
        tokens = s.tokens if self.tokens is None else self.tokens
        spec = model.router
        arrays = router_arrays(p, "layer")
        scale = np.sqrt(s.width) / make.typical_norm(s.width)
        x = make.activations(p.seed, "layer/x", tokens, s.width)
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
            arrays["experts_TK"] = make.choices(p.seed, "layer", tokens, spec.num_experts, spec.top_k)
        if self.backward:
            arrays["dy_TD"] = make.store(make.normal(p.seed, "layer/dy", tokens, s.width), p.dtype)
            # Of the losses' gradients: large enough to matter beside that of y.
            arrays["daux"], arrays["dz"] = (np.asarray(share * tokens, np.float32) for share in (1.0, 0.25))
        return arrays

    def call(self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params) -> LayerOutput:
        """Call the layer."""
        from hal.moe.ops import LayerWeights, SharedWeights

        shared = SharedWeights(*(tensors[name] for name in SHARED)) if SHARED[0] in tensors else None
        weights = LayerWeights(
            tensors["gate_ED"], tensors.get("bias_E"), routed(tensors), shared, tensors.get(SHARED_GATE)
        )
        limit = {} if self.capacity is None else {"capacity": self.limit(p)}
        out: LayerOutput = ops.layer(
            tensors["x_TD"], weights, model_of(p), experts_TK=tensors.get("experts_TK"), **limit
        )
        return out

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Call the layer and its backward, the upstream gradients times a factor; return the results."""
        found = results(self.call(ops, tensors, p))
        upstream = {"y_TD": "dy_TD", "aux_loss": "daux", "z_loss": "dz"}
        # A loss that depends on nothing that is trained has no gradient to pass on; y depends on everything.
        asked = {
            name: tensors[of] * factor
            for name, of in upstream.items()
            if of in tensors and (name == "y_TD" or getattr(found[name], "requires_grad", True))
        }
        run_backward(found, asked)
        return found

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        if not self.backward:
            return observed(results(self.call(ops, tensors, p)))
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shapes and dtypes."""
        spec, x = model_of(p).router, inputs["x_TD"]
        shapes = expected_structure(spec, p, len(x)) | {
            "y_TD": (x.shape, p.dtype), "aux_loss": ((), "float32"), "z_loss": ((), "float32"),
        }  # fmt: skip
        if self.backward:
            storage = {"gate_ED": gate_storage(spec, p)}
            shapes |= {f"d{name}": (inputs[name].shape, storage.get(name, p.dtype)) for name in self.names(inputs)}
        return structure(outputs, shapes)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        return wrong or merge(self.findings(inputs, outputs, p, contract))

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """Return what the detectors say."""
        return judge_layer(inputs, outputs, model_of(p), p, contract, capacity=self.limit(p), backward=self.backward)


def results(out: LayerOutput) -> dict[str, torch.Tensor]:
    """Return what a layer returned, by name."""
    found = fields_of(out, "LayerOutput")
    routing = found.pop("routing")
    return {**found, **fields_of(routing, "Routing")}


class OneUpstream(Layer):
    """A gradient of y without the losses', of one loss, and of the other: three passes."""

    UPSTREAM = ("dy_TD", "daux", "dz")

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: what a pass does not reach has a gradient of zero, or none."""
        import torch

        found: dict[str, torch.Tensor] = {}
        for upstream in self.UPSTREAM:
            leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
            kept = {name: tensor for name, tensor in tensors.items() if name not in self.UPSTREAM}
            outputs = self.there_and_back(ops, {**kept, **leaves, upstream: tensors[upstream]}, p)
            for name, tensor in leaves.items():
                outputs[f"d{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            found |= {f"{upstream}/{name}": tensor for name, tensor in outputs.items()}
        return observed(found)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        zeros = {name: np.zeros_like(inputs[name]) for name in self.UPSTREAM}
        return joined({
            f"{name} alone": super(OneUpstream, self).judge(
                {**inputs, **zeros, name: inputs[name]}, part(outputs, name), p, contract
            )
            for name in self.UPSTREAM
        })  # fmt: skip


class NarrowTails(Tails):
    """At full scale as at "small": all weights come with each number of tokens."""

    def at(self, p: Params) -> dict[str, Params]:
        """See `Tails.at`."""
        return super().at(replace(p, scale="small") if p.scale == "full" else p)


class LongLayer(Long):
    """More tokens than a block has, narrower still: experts are judged in float64."""

    WIDTH = 24


class NoTokens(Layer):
    """Zero tokens."""

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Layer.findings`: losses of zero."""
        return [exact(name, outputs[name], np.zeros((), np.float32)) for name in ("aux_loss", "z_loss")]


_NEEDS = ("layer",)
RESULTS = (*ROUTING, "y_TD", "aux_loss", "z_loss")
_GIVEN = "a replayed routing"
FREE = "the device's own routing, certified by margin and then taken as given"
_GRADIENTS = "y, and the gradients of x, the gate, the experts and the shared experts from those of y and both losses"


def what(how: str, judged: str) -> str:
    """Return the description of a case."""
    return (
        f"A whole layer with {how}: logits, scores, weights, both losses, {judged}. Bound: chained variances, lambda "
        "deviations and half an ulp."
    )


BACKWARD = Layer(
    "layer.backward_replayed", "layer", _NEEDS, what(_GIVEN, _GRADIENTS), replayed=True, backward=True, only=KINDS
)  # fmt: skip
FREE_FORWARD = Layer("layer.forward_free", "layer", _NEEDS, what(FREE, "y"), only=KINDS, at_tiny=KINDS[2:])
FREE_BACKWARD = Layer("layer.backward_free", "layer", _NEEDS, what(FREE, _GRADIENTS), backward=True)
OF_OPERATORS = Composed("layer.of_operators", FREE_BACKWARD, only=("ling-lite",))
CAPACITY = Layer(
    "layer.capacity", "layer", _NEEDS, what(f"{_GIVEN}, where the busier experts drop rows", _GRADIENTS),
    replayed=True, backward=True, capacity=1, only=KINDS, at_tiny=KINDS[1:3],
)  # fmt: skip
ONE_TOKEN = Layer(
    "layer.one_token", "layer", _NEEDS, what(f"{FREE} and one token, as in decoding", _GRADIENTS),
    backward=True, tokens=1, only=KINDS,
)  # fmt: skip
CASES = (
    Layer(
        "layer.forward_replayed", "layer", _NEEDS, what(_GIVEN, "y"), replayed=True, only=KINDS, at_tiny=KINDS[2:]
    ),
    FREE_FORWARD,
    BACKWARD,
    FREE_BACKWARD,
    CAPACITY,
    Layer(
        "layer.capacity_zero", "layer", _NEEDS,
        what(f"{FREE}, where every expert has room for no row, which is not the same as no limit", _GRADIENTS),
        backward=True, capacity=0, only=("ling-lite", "mixtral-8x7b"),
    ),
    ONE_TOKEN,
    Layer(
        "layer.few_tokens", "layer", _NEEDS, what(f"{FREE} and five tokens, as in decoding for a few", _GRADIENTS),
        backward=True, tokens=5, only=("qwen2-moe",),
    ),
    Layer(
        "layer.aligned", "layer", _NEEDS, what(f"{FREE}, and 64 tokens, a number that fills tiles", _GRADIENTS),
        backward=True, tokens=64, only=("mixtral-8x7b",),
    ),
    NoTokens(
        "layer.no_tokens", "layer", _NEEDS, "A layer without tokens: empty results, losses of zero.", tokens=0,
        only=KINDS,
    ),
    OneUpstream(
        "layer.one_upstream", "layer", _NEEDS,
        what(
            f"{_GIVEN}, and three backward passes, of y alone and of either loss alone", "y, and each pass's gradients"
        )
        + " What a pass does not reach has a gradient of exactly zero, or none.",
        replayed=True, backward=True, only=("mixtral-8x7b",),
    ),
    KeptGraph("layer.kept_graph", BACKWARD, only=FEW_EXPERTS),
    Untrained("layer.untrained", FREE_FORWARD, RESULTS, only=FEW_EXPERTS),
    Untrained(
        "layer.capacity_untrained", replace(CAPACITY, backward=False), RESULTS, modes=IN_SERVICE, only=FEW_EXPERTS,
    ),
    Untrained(
        "layer.one_token_untrained", replace(ONE_TOKEN, backward=False), RESULTS, modes=IN_SERVICE,
        only=("qwen2-moe",),
    ),
    Shifted("layer.shifted", BACKWARD, only=FEW_EXPERTS),
    KeptResults("layer.kept", FREE_BACKWARD, only=("qwen2-moe",)),
    # One token, which is cheap, for what else there is: a selection bias, and many experts.
    KeptResults("layer.kept_one_token", ONE_TOKEN, only=("ling-2.0-mini",)),
    OF_OPERATORS,
    KeptResults("layer.of_operators_kept", OF_OPERATORS, only=FEW_EXPERTS),
    Strided("layer.strided", BACKWARD),
    TokenCounts("layer.token_counts", BACKWARD, only=FEW_EXPERTS),
    NarrowTails("layer.tails", FREE_BACKWARD, only=FEW_EXPERTS),
    LongLayer("layer.long", FREE_FORWARD, only=FEW_EXPERTS),
    Unaligned("layer.unaligned", BACKWARD, only=("qwen2-moe",)),
    Wide("layer.wide", BACKWARD, only=FEW_EXPERTS, of=Shape(9, 520, 136)),
    Whole("layer.whole", BACKWARD, only=FEW_EXPERTS),
)  # fmt: skip
