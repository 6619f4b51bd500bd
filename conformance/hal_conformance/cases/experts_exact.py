# SPDX-License-Identifier: Apache-2.0
"""The experts where every order of summation gives the same result, forward: judged bit by bit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Array, Arrays, Footprint, Params, arithmetic
from hal_conformance.cases import designs
from hal_conformance.cases.base import expert_bytes, wide
from hal_conformance.cases.experts import RANDOM, ExpertsCase, routed
from hal_conformance.cases.nonfinite import admitted
from hal_conformance.cases.sized import FEW_EXPERTS
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.detectors import Finding, exact, merge, structure
from hal_conformance.oracle.dispatching import spans
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


def result(inputs: Arrays) -> F64:
    """Return the experts' output where silu is the identity, [R, D]: integers go in and come out."""
    x, want = wide(inputs["x_RD"]), np.zeros(inputs["x_RD"].shape)
    for e, rows in spans(inputs["counts_E"]):
        w1, w3, w2 = (wide(inputs[name][e]) for name in ROUTED)
        want[rows] = (np.maximum(x[rows] @ w1.T, 0.0) * (x[rows] @ w3.T)) @ w2.T
    return want


class ExactExperts(ExpertsCase):
    """A design whose result is exact in every order of summation."""

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: silu is the identity for the gates used here."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        return merge([self.finding("y", outputs["y_RD"], inputs, make.store(result(inputs), p.dtype), contract)])

    def finding(self, name: str, got: Array, inputs: Arrays, expected: Array, contract: Contract) -> Finding:
        """Compare the rows bit by bit, and name the experts of those that differ."""
        want = admitted(expected, got, contract)
        finding = exact(name, got, want)
        if finding.status is Status.EXACT:
            return finding
        counts, here = inputs["counts_E"], wide(got)
        bad = np.flatnonzero(~((here == want) | (np.isnan(here) & np.isnan(want))).all(1))
        owner = np.repeat(np.arange(len(counts)), counts)[bad]
        names = ", ".join(f"expert {e} ({counts[e]} rows)" for e in dict.fromkeys(int(e) for e in owner[:50]))
        return Finding(finding.status, exact=finding.exact, detail=f"{finding.detail}; {names[:120]}")


class Integers(ExactExperts):
    """Small integers; the output needs rounding in the 16-bit dtypes."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.integers(self.size(p))


class ManyRows(Integers):
    """More narrow rows than 16 bits count, in one dtype: CUDA's grids have no more blocks along their second axis."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return FEW_EXPERTS

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return ("bfloat16",)

    def size(self, p: Params) -> designs.Size:
        """See `ExpertsCase.size`: 9,398 and 9,399 rows for each expert but one, which has none."""
        size = super().size(p)
        counts = np.full_like(size.counts_E, 9_398)
        counts[::2] += 1
        counts[make.integers(p.seed, "many/empty", 0, len(counts) - 1, 1)] = 0
        return replace(size, counts_E=counts, width=16, hidden=16)


class Cancelling(ExactExperts):
    """Integers whose partial sums are large and whose sums are small."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.cancelling(self.size(p))


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


class NonfiniteRows(Integers):
    """A row of NaN, one with an infinity, and one that overflows."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: many experts, and few."""
        return ("ling-lite", "mixtral-8x7b")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.with_nonfinite_rows(super().inputs(p), p.dtype)


class TwoCalls(Integers):
    """Two calls of one shape: everything differs, and the first result is read after the second call."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: many experts, and few."""
        return ("ling-lite", "mixtral-8x7b")

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`: the weights are copied, since they are changed."""
        return Footprint(2 * expert_bytes(p))

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: the second call has rows, counts and weights in reverse, the weights in the same memory."""
        x, counts = tensors["x_RD"], tensors["counts_E"]
        weights = routed({name: tensors[name].clone() for name in ROUTED})
        first = ops.experts(x, counts, weights)
        for w in weights:
            w.copy_(w.flip(0))
        return {"y_RD": first, "again_RD": ops.experts(x.flip(0), counts.flip(0), weights)}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: in reverse, the second result is the first."""
        shape = (inputs["x_RD"].shape, p.dtype)
        wrong = structure(outputs, {"y_RD": shape, "again_RD": shape})
        if wrong is not None:
            return wrong
        expected = make.store(result(inputs), p.dtype)
        pairs = {"y": outputs["y_RD"], "y of the second call, in reverse": outputs["again_RD"][::-1]}
        return merge(self.finding(name, got, inputs, expected, contract) for name, got in pairs.items())


_NEEDS = ("experts",)
NONFINITE_ROWS = NonfiniteRows(
    "experts.nonfinite_rows", "experts", _NEEDS,
    "As experts.integers with three other rows: one of NaN, whose result is NaN; one with an infinity, and one of "
    "large numbers whose product overflows, both among weights that make every element of the result infinite in "
    "every order of summation (NaN is right, too: units that split a float32 into parts take inf - inf). A kernel "
    "that returns the largest finite number, or zero, hides an overflow from the training loop. Every other row "
    "is exact.",
)  # fmt: skip
TWO_CALLS = TwoCalls(
    "experts.two_calls", "experts", _NEEDS,
    "As experts.integers, twice: the second call has the same shapes, other rows, other counts, and other weights "
    "in the memory of the first; both results are read after it. Counts or converted weights kept from the first "
    "call show, and a result that the second call overwrites.",
)  # fmt: skip
CASES = (
    Integers(
        "experts.integers", "experts", _NEEDS,
        "Integers whose every partial sum is exact in float32; the gate's channel makes silu the identity. Lost, "
        "doubled or swapped rows, low accumulators and truncated stores show, bit by bit.",
    ),
    ManyRows(
        "experts.many_rows", "experts", _NEEDS,
        "As experts.integers, with 65,789 or 65,790 rows of 16 channels: more than 16 bits count.",
    ),
    Cancelling(
        "experts.cancelling", "experts", _NEEDS,
        "Integers with partial sums of hundreds and small results, in both products: an accumulator of 8 or 11 bits "
        "is wrong, bit by bit.",
    ),
    OneHot(
        "experts.one_hot", "experts", _NEEDS,
        "One-hot rows: the output is one weight of the gate, up or down projection, every bit of it. Weights of the "
        "wrong expert, flipped bits, inputs cut to TF32 and truncated stores of the gate show.",
    ),
    NONFINITE_ROWS, TWO_CALLS,
    Untrained("experts.nonfinite_untrained", NONFINITE_ROWS, ("y_RD",), modes=IN_SERVICE, only=FEW_EXPERTS),
    Untrained("experts.two_calls_untrained", TWO_CALLS, ("y_RD", "again_RD"), modes=IN_SERVICE, only=FEW_EXPERTS),
)  # fmt: skip
