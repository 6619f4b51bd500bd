# SPDX-License-Identifier: Apache-2.0
"""The experts where every order of summation gives the same gradients: judged bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import SCALES, Arrays, Footprint, Params, Scale
from hal_conformance.cases import designs
from hal_conformance.cases.base import wide
from hal_conformance.cases.experts import Backward, BackwardCase
from hal_conformance.cases.frozen import Frozen
from hal_conformance.cases.kept_graph import KeptGraph
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.narrow import Int32, SmallIntegers
from hal_conformance.cases.nonfinite import admitted
from hal_conformance.cases.sized import FEW_EXPERTS, Unaligned
from hal_conformance.cases.strided import Sliced
from hal_conformance.numerics.detectors import ExactMeter, exact, joined, merge
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


class BackwardIntegers(BackwardCase):
    """Integers whose gradients are exact in every order of summation, too."""

    AT_TINY: ClassVar[tuple[str, ...]] = (*BackwardCase.AT_TINY, "ling-2.0-mini")

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`: every number of experts from small on, and the most at tiny, too."""
        return SCALES if preset in self.AT_TINY else SCALES[1:]

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.backward_integers(self.size(p))

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the gate is 64, where silu is the identity and its slope 1."""
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
            y, dx = designs.ONE * u @ w2.T, dg @ w1 + du @ w3
            gradients = (dg.T @ x[rows], du.T @ x[rows], dy[rows].T @ (designs.ONE * u))
            pairs = [("y_RD", outputs["y_RD"][rows], y, rows.start), ("x_RD", outputs["dx_RD"][rows], dx, rows.start)]
            for name, gradient in zip(ROUTED, gradients, strict=True):
                pairs.append((name, outputs[f"d{name}"][e : e + 1], gradient[None], e))
            for name, got, expected, place in pairs:
                meters[name].add(got, admitted(make.store(expected, p.dtype), got, contract), place)
        return merge(meter.finding() for meter in meters.values())


class BackwardCancelling(BackwardIntegers):
    """Gradients whose partial sums are large and whose sums are small."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: few experts, with up to 129 rows."""
        return FEW_EXPERTS

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.backward_cancelling(self.size(p))


class Rounding(Backward):
    """Stages whose results lie between two numbers of the dtype; see `designs.rounding`."""

    ROWS, WIDTH, HIDDEN = 9, 64, 24

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: the arithmetic does not depend on it."""
        return FEW_EXPERTS

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: those in which a stage is stored more narrowly than it is computed."""
        return ("bfloat16", "float16")

    def size(self, p: Params) -> designs.Size:
        """See `ExpertsCase.size`: a few rows for each expert, and narrow ones at every scale."""
        size = super().size(p)
        return replace(size, counts_E=np.full_like(size.counts_E, self.ROWS), width=self.WIDTH, hidden=self.HIDDEN)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint()

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return designs.rounding(self.size(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: what is one rounding away from its inputs is exact, the rest has a bound."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        experts, rows = len(inputs["counts_E"]), self.ROWS
        at, known = 2 * np.arange(rows), np.arange(rows) % 3 != 0
        x, dy = (wide(inputs[name]).reshape(experts, rows, -1) for name in ("x_RD", "dy_RD"))
        w1, w3, w2 = (wide(inputs[name]) for name in ROUTED)
        g, u, dh = x @ w1.swapaxes(1, 2), x @ w3.swapaxes(1, 2), dy @ w2  # [E, rows, F], exact
        pairs = {
            "y_RD": (outputs["y_RD"].reshape(experts, rows, -1), (g * u) @ w2.swapaxes(1, 2)),
            "dw3_EFD": (outputs["dw3_EFD"][:, :, at], (g * dh).swapaxes(1, 2)),
            "dw1_EFD": (outputs["dw1_EFD"][:, :, at[known]], (u * dh)[:, known].swapaxes(1, 2)),
        }
        single = merge(exact(name, got, make.store(expected, p.dtype)) for name, (got, expected) in pairs.items())
        return joined({"single roundings": single, "all": super().judge(inputs, outputs, p, contract)})


class NanBackward(BackwardIntegers):
    """A row that is NaN, a NaN in the upstream gradient of another expert's row, and gradients that overflow."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: many experts, and few."""
        return ("ling-lite", "mixtral-8x7b")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: in the middle of the two busiest experts'."""
        arrays = designs.with_overflowing_gradients(super().inputs(p), p.dtype, p.seed)
        x, dy = arrays["x_RD"].copy(), arrays["dy_RD"].copy()
        (of_x, _), (of_dy, _) = designs.busiest(arrays["counts_E"])
        x[of_x] = np.nan
        dy[of_dy, int(make.integers(p.seed, "nan/dy", 0, dy.shape[1] - 1, 1)[0])] = np.nan
        return {**arrays, "x_RD": x, "dy_RD": dy}


@dataclass(frozen=True)
class OneExpert(BackwardIntegers):
    """All rows on one expert, and the same gradient for each.

    Attributes:
        rows: how many.
        multiple: of which D is the next multiple: aligned widths take other kernels.
    """

    rows: int = 513
    multiple: int = 1

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: many experts, and few."""
        return ("ling-lite", "mixtral-8x7b")

    def size(self, p: Params) -> designs.Size:
        """See `ExpertsCase.size`."""
        size = super().size(p)
        counts = np.zeros_like(size.counts_E)
        counts[make.integers(p.seed, "one/expert", 0, len(counts) - 1, 1)] = self.rows
        return replace(size, counts_E=counts, width=-(-size.width // self.multiple) * self.multiple)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        return {**arrays, "dy_RD": np.repeat(arrays["dy_RD"][:1], self.rows, axis=0)}

    def upstream(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `BackwardCase.upstream`: one row in memory, as the gradient of a sum has."""
        return tensors["dy_RD"][:1].expand_as(tensors["dy_RD"])


_NEEDS = ("experts",)
INTEGERS = BackwardIntegers(
    "experts.backward_integers", "experts", _NEEDS,
    "Integers whose gradients are exact in float32 in any order, at gates where silu's slope is 1: one lost or doubled "
    "row of a weight gradient, a wrong transposition or a low accumulator of the backward products shows, bit by bit.",
)  # fmt: skip
CASES = (
    INTEGERS,
    BackwardCancelling(
        "experts.backward_cancelling", "experts", _NEEDS,
        "As experts.backward_integers, with partial sums 12 bits above the result, which cancel: over hidden units in "
        "the gradient of rows, over rows in those of all three weights. Every stage is stored once: a sum whose parts "
        "are each stored in 16 bits and then added (split-K, the last tile of rows) is wrong, bit by bit.",
    ),
    Rounding(
        "experts.rounding", "experts", _NEEDS,
        "Results and gradients of w1 and w3 that are one rounding away from their inputs, each through one hidden "
        "unit: sums of two weights that lie between two numbers of the dtype, and products of two numbers. Whatever is "
        "stored between, the nearest number comes out, bit by bit. A store that cuts off shows, which is small in a "
        "random sum and has one sign: gradients of weights become 0.3 % too small in bfloat16.",
    ),
    NanBackward(
        "experts.nan_backward", "experts", _NEEDS,
        "As experts.backward_integers with a row of NaN, and one NaN in the upstream gradient of another expert's row: "
        "NaN are these rows' gradients, those of the one expert's weights, and of the other's but for the rows of its "
        "down projection that the NaN does not reach. In two rows of a third expert the upstream gradient is so large "
        "that elements of all four gradients overflow: infinite in every order of summation (NaN is right, too), and "
        "no largest finite number, which would hide the overflow from loss scaling. Every other gradient is exact.",
    ),
    OneExpert(
        "experts.one_expert", "experts", _NEEDS,
        "As experts.backward_integers with 513 rows on one expert and none on the others, and a width that is a "
        "multiple of 128. The upstream gradient is one row in memory, expanded, as that of a sum is. Sums of that many "
        "equal rows overflow in float16.",
        multiple=128,
    ),
    OneExpert(
        "experts.one_row", "experts", _NEEDS, "As experts.one_expert with a single row, as in decoding.", rows=1
    ),
    Frozen("experts.frozen", INTEGERS, ("x_RD",), twice=True),
    Frozen("experts.frozen_parts", INTEGERS, only=FEW_EXPERTS),
    KeptResults("experts.kept", INTEGERS, only=FEW_EXPERTS),
    Sliced("experts.sliced", INTEGERS),
    KeptGraph("experts.kept_graph", INTEGERS, only=FEW_EXPERTS),
    Int32("experts.int32", INTEGERS, only=FEW_EXPERTS),
    SmallIntegers("experts.small_integers", INTEGERS, only=FEW_EXPERTS),
    Unaligned("experts.unaligned", INTEGERS, only=FEW_EXPERTS),
)  # fmt: skip
