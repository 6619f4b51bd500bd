# SPDX-License-Identifier: Apache-2.0
"""The four detectors, and how what they find becomes a verdict.

bound: no element is further from the oracle than its bound. rms: the root mean square of error over standard
deviation is not above its threshold: an accumulator of too few bits shows here before an element leaves its bound.
bias: the signed errors have mean zero, which truncation breaks. exact: inputs whose result every order of summation
gives exactly, compared bit by bit. No single one catches all seeded faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hal_conformance.bounds import Bounded
from hal_conformance.budget import bias_threshold, rms_threshold
from hal_conformance.case import Array, Arrays
from hal_conformance.inputs import NUMPY_DTYPES
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


def where(index: int, shape: tuple[int, ...]) -> str:
    """Return a flat index as the coordinates that a person can look up."""
    return str([int(i) for i in np.unravel_index(index, shape)]) if shape else "[]"


def exact(name: str, got: Array, expected: Array) -> Finding:
    """Compare bit by bit; +0 and -0 are one number, and any NaN is any other."""
    wide, want = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    wrong = ~((wide == want) | (np.isnan(wide) & np.isnan(want)))
    count = int(wrong.sum())
    if count == 0:
        return Finding(Status.EXACT, exact=0.0)
    at = int(np.flatnonzero(wrong.ravel())[0])
    return Finding(
        Status.FAIL_NUMERIC,
        exact=count / wrong.size,
        detail=f"{name}: {count} of {wrong.size} elements differ where the result is exact, first at "
        f"{where(at, wrong.shape)}: {wide.ravel()[at]:.9g}, expected {want.ravel()[at]:.9g}",
    )


def discrete(name: str, got: Array, expected: Array) -> Finding:
    """Compare integers."""
    finding = exact(name, got, expected)
    if finding.status is Status.EXACT:
        return finding
    return Finding(Status.FAIL_DISCRETE, exact=finding.exact, detail=finding.detail)


def judge(name: str, got: Array, expected: Bounded, *, independent: int | None = None, bias: bool = False) -> Finding:
    """Judge an array that rounding may have changed.

    Args:
        name: for the detail.
        got: from the device.
        expected: the oracle's value, bound and variance, the storage included.
        independent: how many of the errors are independent; None: all. Errors of a row that share an intermediate
            result are correlated, and then the number of rows is a safe number: the correlation matrix is block
            diagonal with blocks of the row's length D, its norm is at most D, and n / D is the number of rows.
        bias: also test the mean of the signed errors. Not for sums of skewed positive terms, which are biased
            even when they are rounded correctly.
    """
    wide = np.asarray(got, np.float64)
    value, bound = np.broadcast_to(expected.value, wide.shape), np.broadcast_to(expected.bound, wide.shape)
    var = np.broadcast_to(expected.var, wide.shape)
    if wide.size == 0:
        return Finding(Status.PASS)
    finite = np.isfinite(value)
    largest = float(np.finfo(np.float64).max) if got.dtype == np.float64 else _largest(got)
    overflow = finite & (np.abs(value) + bound > largest) & np.isinf(wide) & (np.sign(wide) == np.sign(value))
    agree = np.where(finite, np.isfinite(wide) | overflow, (wide == value) | (np.isnan(wide) & np.isnan(value)))
    if not agree.all():
        at = int(np.flatnonzero(~agree.ravel())[0])
        return Finding(
            Status.FAIL_NONFINITE,
            detail=f"{name}: {int((~agree).sum())} of {wide.size} elements, first at {where(at, wide.shape)}: "
            f"{wide.ravel()[at]}, expected {value.ravel()[at]:.6g}",
        )
    use = finite & ~overflow
    error = np.where(use, wide - np.where(use, value, 0.0), 0.0)
    error = np.where(use, error, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0.0, 0.0, np.abs(error) / bound)
    margin = float(ratio.max())
    if margin > 1.0:
        at = int(ratio.argmax())
        rows = np.flatnonzero((ratio > 1.0).reshape(wide.shape[0] if wide.ndim else 1, -1).any(axis=1))
        return Finding(
            Status.FAIL_NUMERIC,
            margin,
            detail=f"{name}: {int((ratio > 1).sum())} of {wide.size} elements beyond their bound, in {len(rows)} rows "
            f"({', '.join(map(str, rows[:4]))}{', ...' if len(rows) > 4 else ''}); worst at {where(at, wide.shape)}: "
            f"{wide.ravel()[at]:.9g}, expected {value.ravel()[at]:.9g} within {bound.ravel()[at]:.2g}",
        )
    known = use & (var > 0)
    n = int(known.sum())
    if n == 0:
        return Finding(Status.PASS, margin)
    scaled = error[known] / np.sqrt(var[known])
    free = float(n if independent is None else max(1, min(n, independent)))
    rms = float(np.sqrt(np.mean(scaled**2))) / rms_threshold(free, free)
    z = None
    if bias:
        # A drift towards or away from zero; with fewer independent errors the sum's variance is n * n / free.
        signed = float((scaled * np.sign(value[known])).sum())
        z = signed / np.sqrt(n * n / free) / bias_threshold()
    if rms > 1.0 or (z is not None and abs(z) > 1.0):
        what = (
            f"rms of error over deviation is {rms:.2f} of its threshold"
            if rms > 1
            else f"biased: z is {z:.1f} of its threshold"
        )
        return Finding(Status.DEGRADED, margin, rms, z, detail=f"{name}: less precise than the contract: {what}")
    return Finding(Status.PASS, margin, rms, z)


def _largest(array: Array) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(array.dtype).max)  # type: ignore[no-untyped-call]
