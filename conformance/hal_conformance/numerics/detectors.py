# SPDX-License-Identifier: Apache-2.0
"""The four detectors, and how what they find becomes a verdict.

bound: no element is further from the oracle than its bound. rms: the root mean square of error over standard
deviation is not above its threshold: an accumulator of too few bits shows here before an element leaves its bound.
bias: the signed errors have mean zero, which truncation breaks. exact: inputs whose result every order of summation
gives exactly, compared bit by bit. No single one catches all seeded faults.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hal_conformance.case import I64, Array, Arrays
from hal_conformance.inputs import NUMPY_DTYPES
from hal_conformance.numerics.absent import judgeable
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.budget import bias_threshold, rms_threshold
from hal_conformance.numerics.witness import note
from hal_conformance.verdicts import Judgement, Status, worst


@dataclass(frozen=True)
class Finding:
    """What the detectors say about one array."""

    status: Status
    margin: float | None = None
    rms: float | None = None
    bias: float | None = None
    exact: float | None = None
    detail: str = ""


def merge(findings: Iterable[Finding]) -> Judgement:
    """Return the verdict on a case from those on its arrays: the worst, with the largest figures."""
    found = list(findings)
    status = worst(finding.status for finding in found)

    def largest(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return max(known, key=abs) if known else None

    details = [f.detail for f in found if f.detail and f.status is status]
    return Judgement(
        status,
        largest(f.margin for f in found),
        {
            "bound": largest(f.margin for f in found),
            "rms": largest(f.rms for f in found),
            "bias": largest(f.bias for f in found),
            "exact": largest(f.exact for f in found),
        },
        "; ".join(details[:3]),
    )


def joined(judgements: Mapping[str, Judgement]) -> Judgement:
    """Return the verdict on several runs of a case: the worst, with the largest figures; `merge` for judgements.

    Args:
        judgements: by what tells one run from the others, for the detail.
    """
    return merge(
        Finding(
            one.status, one.margin, one.detectors["rms"], one.detectors["bias"], one.detectors["exact"],
            f"{name}: {one.detail}" if one.detail else "",
        )
        for name, one in judgements.items()
    )  # fmt: skip


def structure(outputs: Arrays, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> Judgement | None:
    """Return a verdict if an output is missing or has another shape or dtype than expected, otherwise None."""
    for name, (shape, dtype) in expected.items():
        array = outputs.get(name)
        if not isinstance(array, np.ndarray):
            return Judgement(Status.FAIL_STRUCTURE, detail=f"there is no output {name!r}")
        if tuple(array.shape) != shape:
            return Judgement(
                Status.FAIL_STRUCTURE, detail=f"{name} has shape {list(array.shape)}, expected {list(shape)}"
            )
        if array.dtype != NUMPY_DTYPES[dtype]:
            return Judgement(Status.FAIL_STRUCTURE, detail=f"{name} has dtype {array.dtype}, expected {dtype}")
    return None


Places = int | I64
"""Where a part of an array lies on its first axis: where it begins, or the index of each of its rows."""


def row_of(row: int, places: Places) -> int:
    """Return the index in the whole array of a row of a part."""
    return places + row if isinstance(places, int) else int(places[row])


def where(index: int, shape: tuple[int, ...], places: Places = 0) -> str:
    """Return a flat index of a part as the coordinates that a person can look up in the whole array."""
    place = [int(i) for i in np.unravel_index(index, shape)]
    return str([row_of(place[0], places), *place[1:]] if place else [])


class ExactMeter:
    """Compares one array bit by bit, whole or in parts; +0 and -0 are one number, and any NaN is any other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._size = self._wrong = 0
        self._first = ""

    def add(self, got: Array, expected: Array, places: Places = 0) -> None:
        """Take in a part."""
        whole, index = got, None
        if (seen := judgeable(got, expected)) is not None:
            index = np.flatnonzero(seen)
            got, expected = got[seen], expected[seen]
        wide, want = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        self._size += wide.size
        wrong = ~((wide == want) | (np.isnan(wide) & np.isnan(want)))
        count = int(wrong.sum())
        if count and index is None:
            note(self._name, whole, wrong, places)
        if count and not self._wrong:
            at = int(np.flatnonzero(wrong.ravel())[0])
            place = where(at if index is None else int(index[at]), whole.shape, places)
            self._first = f"{place}: {wide.ravel()[at]:.9g}, expected {want.ravel()[at]:.9g}"
        self._wrong += count

    def finding(self) -> Finding:
        """Return what was found in everything that was added."""
        if not self._wrong:
            return Finding(Status.EXACT, exact=0.0)
        return Finding(
            Status.FAIL_NUMERIC,
            exact=self._wrong / self._size,
            detail=f"{self._name}: {self._wrong} of {self._size} elements differ where the result is exact, first at "
            f"{self._first}",
        )


def exact(name: str, got: Array, expected: Array) -> Finding:
    """Compare a whole array bit by bit; see `ExactMeter`."""
    meter = ExactMeter(name)
    meter.add(got, expected)
    return meter.finding()


def discrete(name: str, got: Array, expected: Array) -> Finding:
    """Compare integers."""
    finding = exact(name, got, expected)
    if finding.status is Status.EXACT:
        return finding
    return Finding(Status.FAIL_DISCRETE, exact=finding.exact, detail=finding.detail)


class Meter:
    """Judges one array that rounding may have changed, whole or in parts along its first axis.

    Args:
        name: for the detail.
        independent: how many of the errors are independent; None: all. Errors of a row that share an intermediate
            result are correlated, and then the number of rows is a safe number: the correlation matrix is block
            diagonal with blocks of the row's length D, its norm is at most D, and n / D is the number of rows.
        bias: also test the mean of the signed errors. Not for sums of skewed positive terms, which are biased
            even when they are rounded correctly.
    """

    def __init__(self, name: str, *, independent: int | None = None, bias: bool = False) -> None:
        self._name = name
        self._independent = independent
        self._bias = bias
        self._size = self._count = self._nonfinite = self._beyond = 0
        self._squares = self._signed = self._margin = 0.0
        self._first_nonfinite = self._worst = ""
        self._unknown = False
        self._rows: list[int] = []
        self._beyond_rows = 0

    def add(self, got: Array, expected: Bounded, places: Places = 0) -> None:
        """Take in a part."""
        shape, row_size, index = got.shape, math.prod(got.shape[1:]), None
        value, bound, var = (
            part if part.shape == shape else np.broadcast_to(part, shape)
            for part in (expected.value, expected.bound, expected.var)
        )
        if (seen := judgeable(got, value, bound)) is not None:
            # The statistics of all elements cannot be had from some of them: no variance, no RMS and no bias.
            index = np.flatnonzero(seen)
            got, value, bound = (part[seen] for part in (got, value, bound))
            var = np.zeros_like(value)
        wide = np.asarray(got, np.float64)
        self._size += wide.size
        if wide.size == 0:
            return

        def place(at: int) -> str:
            return where(at if index is None else int(index[at]), shape, places)

        with np.errstate(invalid="ignore", over="ignore"):
            use, error = None, np.asarray(wide - value)
        narrowest = bound.min()  # NaN if one is
        if np.isfinite(error).all():  # nearly always, and then in half the time
            if np.isnan(narrowest):
                self._unknown = True
        else:
            finite = np.isfinite(value)
            if np.isnan(bound[finite]).any():
                self._unknown = True  # a comparison with NaN would call everything right
            largest = float(np.finfo(np.float64).max) if got.dtype == np.float64 else _largest(got)
            overflow = finite & (np.abs(value) + bound > largest) & np.isinf(wide) & (np.sign(wide) == np.sign(value))
            same = (wide == value) | (np.isnan(wide) & np.isnan(value))
            agree = np.where(finite, np.isfinite(wide) | overflow, same)
            if not agree.all():
                if not self._nonfinite:
                    at = int(np.flatnonzero(~agree.ravel())[0])
                    self._first_nonfinite = f"{place(at)}: {wide.ravel()[at]}, expected {value.ravel()[at]:.6g}"
                self._nonfinite += int((~agree).sum())
                note(self._name, got, ~agree, places)
                return
            use = finite & ~overflow
            error = np.where(use, wide - np.where(use, value, 0.0), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.asarray(np.abs(error) / bound)
        if not narrowest > 0:
            ratio[error == 0.0] = 0.0  # where the bound is zero, too
        if index is None:
            note(self._name, got, ratio, places)
        at = int(ratio.argmax())
        if (margin := float(ratio.ravel()[at])) > self._margin:
            self._margin = margin
            self._worst = (
                f"{place(at)}: {wide.ravel()[at]:.9g}, expected {value.ravel()[at]:.9g} within {bound.ravel()[at]:.2g}"
            )
        if margin > 1.0:
            beyond = np.flatnonzero(ratio > 1.0)
            self._beyond += len(beyond)
            rows = np.unique((beyond if index is None else index[beyond]) // row_size)
            self._beyond_rows += len(rows)
            self._rows += [row_of(int(row), places) for row in rows[: max(0, 4 - len(self._rows))]]
        if use is not None or not var.min() > 0:
            known = np.asarray(var > 0 if use is None else use & (var > 0))
            error, var, value = error[known], var[known], value[known]
        self._count += error.size
        self._squares += float((error * error / var).sum())
        if self._bias:
            self._signed += float((error / np.sqrt(var) * np.sign(value)).sum())

    def finding(self) -> Finding:
        """Return what the detectors say of everything that was added."""
        name, n = self._name, self._count
        if self._unknown:
            return Finding(Status.INVALID, detail=f"{name}: the bound of a finite result is not a number")
        if self._nonfinite:
            detail = f"{name}: {self._nonfinite} of {self._size} elements, first at {self._first_nonfinite}"
            return Finding(Status.FAIL_NONFINITE, detail=detail)
        free = float(n if self._independent is None else max(1, min(n, self._independent)))
        rms = float(np.sqrt(self._squares / n)) / rms_threshold(free, free) if n else None
        # A drift towards or away from zero; with fewer independent errors the sum's variance is n * n / free.
        z = self._signed / np.sqrt(n * n / free) / bias_threshold() if n and self._bias else None
        if self._margin > 1.0:
            more = ", ..." if self._beyond_rows > len(self._rows) else ""
            detail = (
                f"{name}: {self._beyond} of {self._size} elements beyond their bound, in {self._beyond_rows} "
                f"rows ({', '.join(map(str, self._rows))}{more}); worst at {self._worst}"
            )
            return Finding(Status.FAIL_NUMERIC, self._margin, rms, z, detail=detail)
        if rms is None:
            return Finding(Status.PASS, self._margin if self._size else None)
        if rms > 1.0 or (z is not None and abs(z) > 1.0):
            what = f"rms of error over deviation is {rms:.4g}" if rms > 1.0 else f"biased: z is {z:.1f}"
            detail = f"{name}: less precise than the contract: {what} of its threshold"
            return Finding(Status.DEGRADED, self._margin, rms, z, detail=detail)
        return Finding(Status.PASS, self._margin, rms, z)


def judge(name: str, got: Array, expected: Bounded, *, independent: int | None = None, bias: bool = False) -> Finding:
    """Judge a whole array; see `Meter`."""
    meter = Meter(name, independent=independent, bias=bias)
    meter.add(got, expected)
    return meter.finding()


def _largest(array: Array) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(array.dtype).max)  # type: ignore[no-untyped-call]
