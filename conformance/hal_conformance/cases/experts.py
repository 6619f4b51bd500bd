# SPDX-License-Identifier: Apache-2.0
"""The experts: grouped SwiGLU, on exact designs and on data as it occurs, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.bounds import half_ulp, silu, silu_slope, smallest_normal
from hal_conformance.case import I64, Arrays, Footprint, Params, arithmetic
from hal_conformance.cases import designs
from hal_conformance.cases.base import ByCounts, expert_bytes, leaf, observed, shape, wide
from hal_conformance.cases.strided import Strided
from hal_conformance.chained import Chained
from hal_conformance.detectors import ExactMeter, Finding, Meter, exact, judge, merge, structure
from hal_conformance.oracle.dispatching import spans
from hal_conformance.oracle.experts import SwigluGradients, each, experts
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


class ExpertsCase(ByCounts):
    """One call of the experts."""

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
        from hal.moe.ops import ExpertWeights

        weights = ExpertWeights(*(tensors[name] for name in ROUTED))
        return {"y_RD": ops.experts(tensors["x_RD"], tensors["counts_E"], weights)}

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shape and dtype."""
        return structure(outputs, {"y_RD": (inputs["x_RD"].shape, p.dtype)})


class BackwardCase(ExpertsCase):
    """One call of the experts and of its backward."""

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint(expert_bytes(p), expert_bytes(p))

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        from hal.moe.ops import ExpertWeights

        leaves = {name: leaf(tensors[name]) for name in ("x_RD", *ROUTED)}
        weights = ExpertWeights(*(leaves[name] for name in ROUTED))
        y = ops.experts(leaves["x_RD"], tensors["counts_E"], weights)
        y.backward(tensors["dy_RD"])
        return observed({"y_RD": y, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shape and dtype."""
        gradients = {f"d{name}": (inputs[name].shape, p.dtype) for name in ("x_RD", *ROUTED)}
        return structure(outputs, {"y_RD": (inputs["x_RD"].shape, p.dtype), **gradients})


class ExactExperts(ExpertsCase):
    """A design whose result is exact in every order of summation."""

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: silu is the identity for the gates used here, so integers go in and come out."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        x, counts = inputs["x_RD"], inputs["counts_E"]
        want = np.zeros(x.shape)
        for e, rows in spans(counts):
            w1, w3, w2 = (wide(inputs[name][e]) for name in ROUTED)
            gate = wide(x[rows]) @ w1.T
            want[rows] = (np.where(gate > 0, gate, 0.0) * (wide(x[rows]) @ w3.T)) @ w2.T
        expected = make.store(want, p.dtype)
        finding = exact("y", outputs["y_RD"], expected)
        if finding.status is Status.EXACT:
            return merge([finding])
        bad = np.flatnonzero((wide(outputs["y_RD"]) != wide(expected)).any(1))
        owner = np.repeat(np.arange(len(counts)), counts)[bad]
        names = ", ".join(f"expert {e} ({counts[e]} rows)" for e in dict.fromkeys(int(e) for e in owner[:50]))
        return merge([Finding(finding.status, exact=finding.exact, detail=f"{finding.detail}; {names[:120]}")])


class Integers(ExactExperts):
    """Small integers; the output needs rounding in the 16-bit dtypes."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.integers(self.size(p))


class Cancelling(ExactExperts):
    """Integers whose partial sums are large and whose sums are small."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.cancelling(self.size(p))


class NanRow(Integers):
    """A row that is NaN."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: many experts, and few."""
        return ("ling-lite", "mixtral-8x7b")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: in the middle of the busiest expert's."""
        arrays = super().inputs(p)
        x, counts = arrays["x_RD"].copy(), arrays["counts_E"]
        busiest = int(counts.argmax())
        x[int(counts[:busiest].sum()) + int(counts[busiest]) // 2] = np.nan
        return {**arrays, "x_RD": x}


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


class OneHot(ExactExperts):
    """Rows that pick single weights, so that the output is the weights themselves, bit by bit."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.one_hot(self.size(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: a contract that reduces the inputs is judged by its bound, not bit by bit."""
        if arithmetic(contract, p.dtype).input_bits is None:
            return super().judge(inputs, outputs, p, contract)
        return RANDOM.judge(inputs, outputs, p, contract)


class BackwardIntegers(BackwardCase):
    """Integers whose gradients are exact in every order of summation, too."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.backward_integers(self.size(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the gate is 32, where silu is the identity and its slope 1."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        x, dy = wide(inputs["x_RD"]), wide(inputs["dy_RD"])
        meters = {name: ExactMeter(f"d{name}") for name in ("x_RD", *ROUTED)} | {"y_RD": ExactMeter("y_RD")}
        ends = np.cumsum(inputs["counts_E"])
        for e, end in enumerate(ends):
            rows = slice(int(end - inputs["counts_E"][e]), int(end))
            w1, w3, w2 = (wide(inputs[name][e]) for name in ROUTED)
            u, dh = x[rows] @ w3.T, dy[rows] @ w2
            du, dg = designs.ONE * dh, dh * u
            want = (dg.T @ x[rows], du.T @ x[rows], dy[rows].T @ (designs.ONE * u))
            meters["y_RD"].add(outputs["y_RD"][rows], make.store(designs.ONE * u @ w2.T, p.dtype), rows.start)
            meters["x_RD"].add(outputs["dx_RD"][rows], make.store(dg @ w1 + du @ w3, p.dtype), rows.start)
            for name, gradient in zip(ROUTED, want, strict=True):
                meters[name].add(outputs[f"d{name}"][e : e + 1], make.store(gradient, p.dtype)[None], e)
        return merge(meter.finding() for meter in meters.values())


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
        rows_RD = inputs["x_RD"].shape
        y, dx = (Chained(np.zeros(rows_RD), np.zeros(rows_RD)) for _ in range(2))
        weights = WeightGradients(outputs, counts, dtype)
        w1, w3, w2 = (inputs[name] for name in ROUTED)
        rule = arithmetic(contract, dtype)
        for e, rows, inside in each(inputs["x_RD"], counts, (w1, w3, w2), dtype, rule):
            gradients = inside.backward(Chained.exact(inputs["dy_RD"][rows]))
            y[rows], dx[rows] = inside.y, gradients.dx
            weights.add(e, gradients)
        found = [
            judge(name, outputs[name], whole.bounded(dtype), independent=len(whole.value))
            for name, whole in (("y_RD", y), ("dx_RD", dx))
        ]
        return merge([*found, *weights.findings()])


class WeightGradients:
    """Judges the gradients of the experts' weights, a few experts at a time.

    Errors of one expert's gradient share its rows, so that there are as many independent ones as experts with rows. An
    expert without rows has gradients of exactly zero.
    """

    TOGETHER = 2**17
    """Elements that are judged at once: enough for numpy to be busy, and few beside all experts'."""

    def __init__(self, outputs: Arrays, counts_E: I64, dtype: str) -> None:
        self._outputs = outputs
        self._dtype = dtype
        self._empty = np.flatnonzero(counts_E == 0)
        used = int((counts_E > 0).sum())
        self._meters = {f"d{name}": Meter(f"d{name}", independent=used) for name in ROUTED}
        self._waiting: list[tuple[int, SwigluGradients]] = []

    def add(self, expert: int, gradients: SwigluGradients) -> None:
        """Take in those of one expert."""
        self._waiting.append((expert, gradients))
        if len(self._waiting) * gradients.dw1_FD.value.size >= self.TOGETHER:
            self._judge()

    def _judge(self) -> None:
        if not self._waiting:
            return
        places = np.array([expert for expert, _ in self._waiting])
        for index, (name, meter) in enumerate(self._meters.items()):
            parts = [gradients.weights[index] for _, gradients in self._waiting]
            together = Chained(np.stack([p.value for p in parts]), np.stack([p.var for p in parts]))
            got = self._outputs[name]
            meter.add(got[places], together.bounded(self._dtype, got.size), places)
        self._waiting.clear()

    def findings(self) -> list[Finding]:
        """Return what was found, and whether experts without rows have zeros."""
        self._judge()
        found = [meter.finding() for meter in self._meters.values()]
        for name in self._meters:
            zeros = exact(
                f"{name} of experts without rows", self._outputs[name][self._empty],
                np.zeros_like(self._outputs[name][self._empty]),
            )  # fmt: skip
            if zeros.status is not Status.EXACT:
                found.append(zeros)
        return found


_NEEDS = ("experts",)
INTEGERS = Integers(
    "experts.integers", "experts", _NEEDS,
    "Integers whose every partial sum is exact in float32; the gate's channel makes silu the identity. Lost, "
    "doubled or swapped rows, low accumulators and truncated stores show, bit by bit.",
)  # fmt: skip
CANCELLING = Cancelling(
    "experts.cancelling", "experts", _NEEDS,
    "Integers with partial sums of hundreds and small results, in both products: an accumulator of 8 or 11 bits "
    "is wrong, bit by bit.",
)  # fmt: skip
ONE_HOT = OneHot(
    "experts.one_hot", "experts", _NEEDS,
    "One-hot rows: the output is one weight of the gate, up or down projection, every bit of it. Weights of the wrong "
    "expert, flipped bits, inputs cut to TF32 and truncated stores of the gate show.",
)  # fmt: skip
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
BACKWARD_INTEGERS = BackwardIntegers(
    "experts.backward_integers", "experts", _NEEDS,
    "Integers whose gradients are exact in float32 in any order, at gates where silu's slope is 1: one lost or doubled "
    "row of a weight gradient, a wrong transposition or a low accumulator of the backward products shows, bit by bit.",
)  # fmt: skip
ACTIVATION = Activation(
    "experts.activation", "experts", _NEEDS,
    "silu and its slope where nothing else rounds: one-hot rows make every gate a weight. In the 16-bit dtypes every "
    "finite value occurs. Bound: bounds.silu and silu_slope; a form that is exact relative to 1 instead of to the "
    "result (1/2 + 1/2 tanh) is not admitted.",
)  # fmt: skip
NAN_ROW = NanRow(
    "experts.nan_row", "experts", _NEEDS,
    "As experts.integers with one row of NaN: that row's result is NaN, and every other is exact.",
)  # fmt: skip
NO_ROWS = NoRows("experts.no_rows", "experts", _NEEDS, "Zero rows: an empty result, and gradients of exactly zero.")
CASES = (
    INTEGERS, CANCELLING, ONE_HOT, ACTIVATION, RANDOM, BACKWARD, BACKWARD_INTEGERS, NAN_ROW, NO_ROWS,
    Strided("experts.strided", BACKWARD),
)  # fmt: skip
