# SPDX-License-Identifier: Apache-2.0
"""Where an implementation of the experts rounds to the storage dtype: honest ones differ, and the bounds admit all.

A run that is compared with another one differs first of all by these places, so they are found and stated: gate, up
projection and their product are chosen so that every sum is exact and rounding shows wherever it is done.

Legend: R rows, D model dim, E experts, F expert hidden dim.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Params
from hal_conformance.cases.base import wide
from hal_conformance.cases.experts import ExpertsCase
from hal_conformance.numerics.bounds import SIGNIFICANDS
from hal_conformance.oracle.dispatching import spans
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement, Status

ROWS = 8
"""Of each expert."""
POINTS = ("gate", "up", "product")
"""What may be stored: silu's argument or result, w3 x, and their product."""


class Stores(ExpertsCase):
    """The readings under which the experts' output is what the implementation returned, bit by bit."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("mixtral-8x7b",)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: in float32 nothing is stored more narrowly than it is computed."""
        return ("bfloat16", "float16")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        A row has two ones, in channels 2 i and 2 i + 1. The gate is in [64, 128), where silu is the identity, the up
        projection in [1, 2); either is a number of the dtype plus or minus a quarter of its ulp, two bits more than the
        dtype has. So their product fits into float32, and a sum of two of them nearly always. An output is the
        sum of two hidden units: rounding them before or after shows.
        """
        size, bits = self.size(p), SIGNIFICANDS[p.dtype]
        experts, hidden, width = len(size.counts_E), size.hidden, size.width
        pairs = width // 2
        rows = experts * ROWS
        x = np.zeros((rows, width))
        at = make.integers(p.seed, "stores/x", 0, pairs - 1, rows)
        x[np.arange(rows), 2 * at] = x[np.arange(rows), 2 * at + 1] = 1.0

        def split(name: str, scale: float) -> F64:
            shape = (experts, hidden, pairs)
            coarse = make.integers(p.seed, f"stores/{name}/coarse", 2 ** (bits - 1), 2**bits - 1, *shape)
            fine = 2 * make.integers(p.seed, f"stores/{name}/fine", 0, 1, *shape) - 1  # a quarter of an ulp, either way
            whole = np.stack([coarse * 4.0, fine * 1.0], axis=-1) * (scale / 2.0 ** (bits + 1))
            return whole.reshape(experts, hidden, width)

        w2 = np.zeros((experts, width, hidden))
        for d in range(width):
            first, second = make.permutation(p.seed, f"stores/w2/{d}", hidden)[:2]
            w2[:, d, first], w2[:, d, second] = 1.0, -0.5
        arrays = {"x_RD": x, "w1_EFD": split("gate", 64.0), "w3_EFD": split("up", 1.0), "w2_EDF": w2}
        return {name: make.store(array, p.dtype) for name, array in arrays.items()} | {
            "counts_E": np.full(experts, ROWS, np.int64)
        }

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: any reading is right; the numbers themselves are judged by the other cases."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        if np.isnan(wide(outputs["y_RD"])).all():
            return Judgement(Status.FAIL_NONFINITE, detail="y is NaN throughout")
        got = wide(outputs["y_RD"])
        seen = ~np.isnan(got)  # a recording does not hold all
        shares = {
            stored: float((got == wide(output(inputs, p.dtype, stored)))[seen].mean())
            for n in range(len(POINTS) + 1) for stored in itertools.combinations(POINTS, n)
        }  # fmt: skip
        best = max(shares, key=lambda stored: (shares[stored], len(stored)))
        where = f"experts round {', '.join(best) or 'nothing inside'}"
        if shares[best] < 1.0:
            where = f"no reading of the experts' stores gives all of y; the nearest: {where} ({shares[best]:.2%})"
        return Judgement(Status.PASS, detail=where)


def output(inputs: Arrays, dtype: str, stored: tuple[str, ...]) -> Any:
    """Return y as an implementation gives it that stores these."""
    x, y = wide(inputs["x_RD"]), np.zeros(inputs["x_RD"].shape)

    def at(point: str, value: F64) -> F64:
        return wide(make.store(value, dtype)) if point in stored else value

    for e, rows in spans(inputs["counts_E"]):
        w1, w3, w2 = (wide(inputs[name][e]) for name in ROUTED)
        gate, up = at("gate", x[rows] @ w1.T), at("up", x[rows] @ w3.T)
        y[rows] = at("product", gate * up) @ w2.T
    return make.store(y, dtype)


CASES = (
    Stores(
        "contract.stores", "contract", ("experts",),
        "The experts on numbers whose every sum is exact and that need two bits more than the dtype has: the output "
        "says which of gate, up projection and product are rounded to the storage dtype. All are right, and the bounds "
        "admit them; the detail says which it is, since it is the first thing in which two devices differ.",
    ),
)  # fmt: skip
