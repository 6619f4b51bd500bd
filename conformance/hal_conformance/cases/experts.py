# SPDX-License-Identifier: Apache-2.0
"""The experts: grouped SwiGLU, on data as it occurs, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import SCALES, Arrays, Footprint, Params, Scale, arithmetic
from hal_conformance.cases import designs
from hal_conformance.cases.base import (
    Base,
    Shape,
    backward,
    expert_bytes,
    leaf,
    observed,
    one_for_each,
    shape,
    wide,
)
from hal_conformance.cases.sized import FEW_EXPERTS, Whole, Wide
from hal_conformance.cases.strided import Shifted, Strided
from hal_conformance.cases.untrained import Untrained
from hal_conformance.cases.weight_gradients import WeightGradients
from hal_conformance.numerics.bounds import half_ulp, silu, silu_slope, smallest_normal
from hal_conformance.numerics.chained import Chained
from hal_conformance.numerics.detectors import Finding, judge, merge, structure
from hal_conformance.oracle.experts import each, experts, unknown
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch

    from hal.moe.ops import ExpertWeights


def routed(tensors: Mapping[str, torch.Tensor]) -> ExpertWeights:
    """Return the experts' weights among the tensors of a case."""
    from hal.moe.ops import ExpertWeights

    return ExpertWeights(*(tensors[name] for name in ROUTED))


class ExpertsCase(Base):
    """One call of the experts."""

    AT_TINY: ClassVar[tuple[str, ...]] = ("mixtral-8x7b", "ling-lite")

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: one for every number of experts, which is all that their products see of a model."""
        return one_for_each(lambda model: model.router.num_experts)

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`: at tiny the fewest experts and a middle one, from small on the most and a ragged one."""
        if preset in self.AT_TINY:
            return SCALES
        return SCALES[1:] if preset in ("ling-2.0-mini", "qwen2-moe") else SCALES[2:]

    def size(self, p: Params) -> designs.Size:
        """Return the sizes, with rows per expert: many residues, an empty expert, one with a single row."""
        spec, s = preset(p.preset).router, shape(p)
        counts = make.sweep_counts(p.seed, "experts/counts", spec.num_experts, s.tokens * spec.top_k)
        return designs.Size(counts, s.width, s.hidden, p.dtype, p.seed)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint(expert_bytes(p))

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return {"y_RD": ops.experts(tensors["x_RD"], tensors["counts_E"], routed(tensors))}

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shape and dtype."""
        return structure(outputs, {"y_RD": (inputs["x_RD"].shape, p.dtype)})


class BackwardCase(ExpertsCase):
    """One call of the experts and of its backward."""

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the inputs that have gradients."""
        return ("x_RD", *ROUTED)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint(expert_bytes(p), expert_bytes(p))

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Call the experts and their backward, the upstream gradient times a factor; return the result."""
        y = ops.experts(tensors["x_RD"], tensors["counts_E"], routed(tensors))
        backward(y, self.upstream(tensors) if factor == 1.0 else self.upstream(tensors) * factor)
        return {"y_RD": y}

    def upstream(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the gradient of y."""
        return tensors["dy_RD"]

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shape and dtype."""
        gradients = {f"d{name}": (inputs[name].shape, p.dtype) for name in self.names(inputs)}
        return structure(outputs, {"y_RD": (inputs["x_RD"].shape, p.dtype), **gradients})


class Random(ExpertsCase):
    """Activations with heavy tails and outlier channels."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.as_it_occurs(self.size(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        w1, w3, w2 = (inputs[name] for name in ROUTED)
        y = experts(inputs["x_RD"], inputs["counts_E"], (w1, w3, w2), p.dtype, arithmetic(contract, p.dtype))
        return merge([judge("y", outputs["y_RD"], y.bounded(p.dtype), independent=len(y.value))])


class Backward(BackwardCase):
    """Gradients of inputs and weights."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = designs.as_it_occurs(self.size(p))
        arrays["dy_RD"] = make.store(make.normal(p.seed, "experts/dy", *arrays["x_RD"].shape), p.dtype)
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        counts, dtype = inputs["counts_E"], p.dtype
        y, dx = (unknown(inputs["x_RD"].shape) for _ in range(2))
        weights = WeightGradients(outputs, counts, dtype)
        w1, w3, w2 = (inputs[name] for name in ROUTED)
        rule = arithmetic(contract, dtype)
        for part in each(inputs["x_RD"], counts, (w1, w3, w2), dtype, rule):
            gradients = part.inside.backward(Chained.exact(inputs["dy_RD"][part.rows]))
            y[part.rows], dx[part.rows] = part.inside.y, gradients.dx
            if part.whole:
                weights.add(part.experts, gradients)
        found = [
            judge(name, outputs[name], whole.bounded(dtype), independent=len(whole.value))
            for name, whole in (("y_RD", y), ("dx_RD", dx))
        ]
        return merge([*found, *weights.findings()])


class OnlyExpert(Backward):
    """One expert, which has all rows."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: the number of experts is the case's own."""
        return FEW_EXPERTS

    def size(self, p: Params) -> designs.Size:
        """See `ExpertsCase.size`."""
        return replace(super().size(p), counts_E=np.array([shape(p).tokens]))


class Activation(BackwardCase):
    """silu and its slope, alone: every value of a 16-bit dtype, and as many of float32."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: the values do not depend on the router, so one with experts enough stands for all."""
        return ("ling-lite",)

    def size(self, p: Params) -> designs.Size:
        """See `ExpertsCase.size`: as many rows as channels for each expert."""
        size = super().size(p)
        return replace(size, counts_E=np.full_like(size.counts_E, size.width))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.activation(self.size(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: y holds u silu(g), the gradient of w1 holds u silu'(g), that of w3 holds silu(g)."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        size = self.size(p)
        shown, dtype = min(size.hidden, size.width), p.dtype
        g, u = (wide(inputs[name][:, :shown]) for name in ROUTED[:2])  # [E, shown, D]
        s, slope = silu(g).stored(dtype), silu_slope(g).stored(dtype)
        y = outputs["y_RD"].reshape(len(g), size.width, size.width)[:, :, :shown].transpose(0, 2, 1)
        pairs = {
            "y": (y, s.scaled(u)),
            "dw1_EFD": (outputs["dw1_EFD"][:, :shown], slope.scaled(u)),
            "dw3_EFD": (outputs["dw3_EFD"][:, :shown], s),
        }
        least = smallest_normal(dtype)
        found = []
        for name, (got, expected) in pairs.items():
            # Below the normal numbers each of three stores rounds to a multiple of the smallest one, and may flush.
            small = (np.abs(expected.value) < least) | (np.abs(s.value) < least) | (np.abs(g) < least)
            lost = 3.0 * half_ulp(np.zeros(1), dtype)
            if contract.subnormals != "preserved":
                lost = lost + np.maximum(np.abs(expected.value), least * np.maximum(1.0, np.abs(u)))
            found.append(judge(name, got, expected.widened(np.where(small, lost, 0.0))))
        return merge(found)


class NoRows(BackwardCase):
    """Zero rows: an empty result, and gradients of exactly zero."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: many experts, and few."""
        return ("ling-lite", "mixtral-8x7b")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        size = self.size(p)
        arrays = designs.as_it_occurs(replace(size, counts_E=np.zeros_like(size.counts_E)))
        return {**arrays, "dy_RD": arrays["x_RD"]}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        return merge(WeightGradients(outputs, inputs["counts_E"], p.dtype).findings() or [Finding(Status.EXACT)])


_NEEDS = ("experts",)
RANDOM = Random(
    "experts.random", "experts", _NEEDS,
    "Heavy tails and outlier channels. Bound: lambda deviations of the chain g, u, silu, h, y, each of which may "
    "be stored in the dtype, plus half an ulp (oracle.experts). RMS with one independent error a row.",
)  # fmt: skip
BACKWARD = Backward(
    "experts.backward", "experts", _NEEDS,
    "Gradients of inputs and of the three weights, chained in the same way (oracle.experts.Swiglu.backward); exactly "
    "zero for an expert without rows (MSLK PR#158, pytorch PR#174314).",
)  # fmt: skip
CASES = (
    Activation(
        "experts.activation", "experts", _NEEDS,
        "silu and its slope where nothing else rounds: one-hot rows make every gate a weight. In the 16-bit dtypes "
        "every finite value occurs. Bound: bounds.silu and silu_slope; a form that is exact relative to 1 instead of "
        "to the result (1/2 + 1/2 tanh) is not admitted.",
    ),
    RANDOM,
    BACKWARD,
    OnlyExpert("experts.only_expert", "experts", _NEEDS, "As experts.backward with E = 1, which has all rows."),
    NoRows("experts.no_rows", "experts", _NEEDS, "Zero rows: an empty result, and gradients of exactly zero."),
    Strided("experts.strided", BACKWARD),
    Shifted("experts.shifted", BACKWARD, only=FEW_EXPERTS),
    Untrained("experts.untrained", RANDOM, ("y_RD",), only=FEW_EXPERTS),
    Wide("experts.wide", BACKWARD, only=FEW_EXPERTS),
    Wide("experts.deep", BACKWARD, only=FEW_EXPERTS, of=Shape(9, 40, 520)),
    Whole("experts.whole", BACKWARD, only=FEW_EXPERTS),
)  # fmt: skip
