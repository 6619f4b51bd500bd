# SPDX-License-Identifier: Apache-2.0
"""Probes of the device's own arithmetic, held against the contract that it declares and all bounds are derived from.

A promise that is too good would make bounds too tight, and every other verdict unfair; so it is red here, by name. What
is better than promised, or not promised, is green and stated. `hal_conformance.cases.stores` asks the same of an
implementation.

Legend: M rows, K inner length, N columns, T rows, E numbers in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Params, arithmetic
from hal_conformance.cases.base import Base, wide
from hal_conformance.numerics.bounds import SIGNIFICANDS, smallest_normal
from hal_conformance.numerics.detectors import structure
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch

INNER = 64
"""Enough for a matrix unit to take the products."""

PLACES = 12
"""Random places of each set of terms, with either sign of the small one. It is lost, in an accumulator that is too
narrow, if it meets the large term of its own sign before the other one comes: at a place, with one of its signs, unless
the large ones meet first. That is a third of all orders, so that nothing is lost anywhere in 3**-12 of all cases."""
COLUMNS = 2 * PLACES

FEWEST, WIDEST = 7, 26
"""Bits of an accumulator that are told apart: fewer than any storage dtype has, and as many as fit into all of them."""


class DeviceCase(Base):
    """A case that calls torch, not the implementation: one preset stands for all."""

    @property
    def multiplies(self) -> bool:
        """See `Case.multiplies`."""
        return True

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)


def judged(stated: str, broken: list[str]) -> Judgement:
    """Return green with what was found, or red with what contradicts the contract."""
    if broken:
        return Judgement(Status.FAIL_NUMERIC, detail=f"the contract promises more: {'; '.join(broken)}")
    return Judgement(Status.PASS, detail=stated)


SMALL = {"one": 1.0, "most": 1.75}
"""1 survives in an accumulator of b + 1 bits. In one of b bits 1.75 becomes 2 if it rounds to nearest, 0 if it cuts."""


def sums(p: Params, name: str) -> F64:
    """Return three terms, 2**b, the small one of that name with either sign and -2**b, for every b, at random places.

    [WIDEST - FEWEST, COLUMNS, K], to be multiplied by `scales`, which is 2**11 at every other place.
    """
    small = SMALL[name]
    rows = np.zeros((WIDEST - FEWEST, PLACES, 2, INNER))
    half = INNER // 2
    for b in range(FEWEST, WIDEST):
        for place in range(PLACES):
            # A large term of float16 is a product: 2**(b - 11) times 2**11.
            lead = 2 * make.permutation(p.seed, f"contract/{name}/{b}/{place}/large", half)[:2]
            tail = 2 * make.permutation(p.seed, f"contract/{name}/{b}/{place}/small", half)[0] + 1
            rows[b - FEWEST, place, :, lead[0]] = 2.0 ** (b - 11)
            rows[b - FEWEST, place, :, lead[1]] = -(2.0 ** (b - 11))
            rows[b - FEWEST, place, :, tail] = small, -small
    return rows.reshape(WIDEST - FEWEST, COLUMNS, INNER)


def scales() -> F64:
    """Return [K, N] factors of `sums`."""
    return np.where(np.arange(INNER)[:, None] % 2 == 0, 2.0**11, 1.0) * np.ones((1, COLUMNS))


class Products(DeviceCase):
    """Bits that survive of inputs and in sums, and how sums are rounded."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        bits = SIGNIFICANDS[p.dtype]
        odd = 1.0 + 2.0 ** -np.arange(1.0, bits)  # of 2 to all bits
        rows = np.zeros((bits - 1, INNER))
        rows[np.arange(bits - 1), make.permutation(p.seed, "contract/width", INNER)[: bits - 1]] = odd
        terms = np.concatenate([sums(p, name).reshape(-1, INNER) for name in SMALL])
        arrays = {"rows_MK": rows, "ones_KN": np.ones((INNER, COLUMNS)), "sums_MK": terms, "scales_KN": scales()}
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: with the narrow values on either side of a product; of the sums one column for each place."""
        rows, ones = tensors["rows_MK"], tensors["ones_KN"]
        by_place = (tensors["sums_MK"] @ tensors["scales_KN"]).reshape(-1, COLUMNS, COLUMNS)
        return {
            "left_MN": rows @ ones, "right_NM": ones.mT.contiguous() @ rows.mT.contiguous(),
            "sums_M": by_place.diagonal(dim1=1, dim2=2).reshape(-1),
        }  # fmt: skip

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        bits = SIGNIFICANDS[p.dtype]
        wrong = structure(outputs, {
            "left_MN": ((bits - 1, COLUMNS), p.dtype), "right_NM": ((COLUMNS, bits - 1), p.dtype),
            "sums_M": ((2 * (WIDEST - FEWEST) * COLUMNS,), p.dtype),
        })  # fmt: skip
        if wrong is not None:
            return wrong
        rule = arithmetic(contract, p.dtype)
        exact = wide(inputs["rows_MK"]).sum(1)[:, None]
        left, right = wide(outputs["left_MN"]), wide(outputs["right_NM"]).T
        seen = (left == exact).all(1) & (right == exact).all(1)
        kept = 1 + _first_failure(seen)
        ones, most = np.abs(wide(outputs["sums_M"])).reshape(2, WIDEST - FEWEST, COLUMNS)
        held = FEWEST + _first_failure((ones == 1.0).all(1))
        stated = f"products keep {kept} of {bits} bits, sums {held}{_OPEN.get(held, '')}"
        broken = []
        if kept < (promised := min(bits, rule.input_bits or bits)):
            broken.append(f"products keep {kept} bits, not {promised}")
        if held < (promised := min(rule.accumulator_bits, WIDEST)):
            broken.append(f"sums keep {held} bits, not {promised}")
        if held < WIDEST:
            rounded = most[held - FEWEST]
            rounding = "nearest" if (rounded >= 1.75).all() else "truncate" if (rounded == 0.0).any() else "neither"
            stated += {"nearest": ", rounded to nearest", "truncate": ", cut"}.get(rounding, ", rounded oddly")
            if rounding != "nearest" and rule.rounding == "nearest" and held <= rule.accumulator_bits:
                broken.append("sums are cut, not rounded to nearest")
        return judged(stated, broken)


_OPEN = {FEWEST: " or fewer", WIDEST: " or more"}


def _first_failure(good: Any) -> int:
    """Return how many are good before the first that is not."""
    return len(good) if good.all() else int(np.argmin(good))


class Special(DeviceCase):
    """Subnormal numbers in and out, infinities, NaN, and overflow."""

    NAMES = ("subnormal in", "subnormal out", "infinity", "negative infinity", "NaN", "overflow")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: one number in each row, at a random place; columns are powers of two."""
        tiny = smallest_normal(p.dtype)
        top = float(ml_dtypes.finfo(make.NUMPY_DTYPES[p.dtype]).max)  # type: ignore[no-untyped-call]
        numbers = (tiny / 4, tiny * 4, np.inf, -np.inf, np.nan, top)
        rows = np.zeros((len(numbers), INNER))
        rows[np.arange(len(numbers)), make.permutation(p.seed, "contract/special", INNER)[: len(numbers)]] = numbers
        columns = np.tile([2.0**6, 2.0**-4, 1.0, 2.0], COLUMNS // 4)
        return {
            "rows_MK": make.store(rows, p.dtype), "powers_KN": make.store(np.tile(columns, (INNER, 1)), p.dtype),
        }  # fmt: skip

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return {"y_MN": tensors["rows_MK"] @ tensors["powers_KN"]}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, {"y_MN": ((len(self.NAMES), COLUMNS), p.dtype)})
        if wrong is not None:
            return wrong
        y, tiny = wide(outputs["y_MN"]).reshape(len(self.NAMES), -1, 4), smallest_normal(p.dtype)
        up, down, same, double = range(4)
        found = {
            "subnormal inputs": (y[0, :, up] == tiny * 16).all(),
            "subnormal results": (y[1, :, down] == tiny / 4).all(),
            "infinities": (y[2, :, same] == np.inf).all() and (y[3, :, same] == -np.inf).all(),
            "NaN": np.isnan(y[4, :, same]).all(), "overflow to infinity": (y[5, :, double] == np.inf).all(),
        }  # fmt: skip
        lost = [name for name, there in found.items() if not there]
        stated = f"loses {', '.join(lost)}" if lost else "keeps subnormal numbers, infinities and NaN"
        asked = [name for name in found if name.startswith("subnormal")] if contract.subnormals == "preserved" else []
        if contract.nonfinite == "ieee":
            asked += [name for name in found if not name.startswith("subnormal")]
        return judged(stated, [f"{name} lost" for name in asked if not found[name]])


class Ties(DeviceCase):
    """Which of equal numbers the device's own top-k takes; `hal.moe` orders them itself."""

    T, E, K = 64, 64, 8

    @property
    def multiplies(self) -> bool:
        """See `Case.multiplies`."""
        return False

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {"x_TE": make.store(make.integers(p.seed, "contract/ties", 0, 3, self.T, self.E), p.dtype)}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return {"index_TK": tensors["x_TE"].topk(self.K, dim=1).indices}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, {"index_TK": ((self.T, self.K), "int64")})
        if wrong is not None:
            return wrong
        x, got = wide(inputs["x_TE"]), outputs["index_TK"]
        want = np.argsort(-x, axis=1, kind="stable")[:, : self.K]
        if (np.sort(x, axis=1)[:, ::-1][:, : self.K] != np.take_along_axis(x, got % self.E, axis=1)).any():
            return Judgement(Status.FAIL_DISCRETE, detail="top-k returns others than the largest numbers")
        share = float((got == want).mean())
        if share == 1.0:
            return judged("top-k takes the lower index of equal numbers", [])
        other = f"{1 - share:.0%} of top-k's ties not by the lower index"
        return judged(other, [other] if contract.topk_ties == "lower_index" else [])


CASES = (
    Products(
        "contract.products", "contract", (),
        "The device's own matrix product: numbers of 2 to all bits on either side, and sums of 2**b, 1 or -1, -2**b at "
        "12 random places for each b: how many bits survive of inputs and in sums, and whether 1.75 beyond them is "
        "rounded or cut. FAIL-NUMERIC if the contract promises more; the detail says what was found.",
    ),
    Special(
        "contract.special", "contract", (),
        "The device's own matrix product of subnormal numbers, infinities and NaN, and of numbers whose product is too "
        "large. FAIL-NUMERIC if the contract promises more; the detail says what was found.",
    ),
    Ties(
        "contract.ties", "contract", (),
        "The device's own top-k on numbers of which many are equal. FAIL-NUMERIC if the contract promises the lower "
        "index and another one comes; the detail says what was found.",
    ),
)  # fmt: skip
