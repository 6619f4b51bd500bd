# SPDX-License-Identifier: Apache-2.0
"""Elements that a recording does not hold: judging what is there, and nothing else.

A recording holds samples of a large output (`sampling`). The judge gets a whole array all the same, in which every
other element is a NaN with bits of its own. Those bits survive slicing, copying and widening, so that the detectors
know such an element wherever it turns up; and whatever is computed from it is NaN, so that a stage whose input is not
there is left unjudged instead of being judged wrongly. No case has to know about recordings.

A stage whose oracle is NaN is then unjudged, too: it cannot be told from one whose input is not there. The recorder,
which had everything, has judged it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hal_conformance.case import I64, Array

Mask = npt.NDArray[np.bool_]

# A quiet NaN whose first seven bits of significand are 1010101: one number in all of these dtypes, so that widening
# (which keeps the leading bits, IEEE 754-2019, 6.2.3) maps each of them to the next.
_BITS = {
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7FD5),
    np.dtype(np.float16): np.uint16(0x7EA8),
    np.dtype(np.float32): np.uint32(0x7FD50000),
    np.dtype(np.float64): np.uint64(0x7FFAA00000000000),
}


@dataclass(frozen=True)
class Needed:
    """What has a part in an element that is there. The oracle need not compute the rest: what it says of that is
    unknown, like everything that follows from what is absent.

    Attributes:
        experts: those of which every row has; others have the `rows` alone.
        rows: of the experts' input, or tokens in a layer.
    """

    experts: frozenset[int]
    rows: frozenset[int]


@dataclass
class Coverage:
    """How many elements were judged, of how many that the detectors were shown.

    Attributes:
        whole: whether nothing is absent: then a NaN of the oracle is what it expects.
        arrays: whether of each array all elements are there, or none: then there are its statistics, too.
    """

    judged: int = 0
    shown: int = 0
    whole: bool = False
    arrays: bool = False


_coverage: ContextVar[Coverage | None] = ContextVar("coverage", default=None)
_needed: ContextVar[Needed | None] = ContextVar("needed", default=None)


def can_be_absent(dtype: np.dtype[np.generic]) -> bool:
    """Tell whether an element of that dtype can be marked as absent."""
    return dtype in _BITS


def blank(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Return an array of which every element is absent, in one element's memory; copy it to write into it."""
    return np.broadcast_to(np.asarray(_BITS[dtype]).view(dtype), shape)


def is_absent(array: Array) -> Mask:
    """Return which elements are absent; the array may be a copy of the one that was made by `blank`, widened or not."""
    mark = _BITS.get(array.dtype)
    if mark is None:
        return np.zeros(array.shape, bool)
    return np.asarray(np.ascontiguousarray(array).view(mark.dtype).reshape(array.shape) == mark)


def present(array: Array) -> Array:
    """Return the array with another NaN in each element whose bits would say that it is absent: that one is there."""
    absent = is_absent(array)
    return np.where(absent, np.asarray(np.nan, array.dtype), array) if absent.any() else array


@contextmanager
def partial(needed: Needed | None = None, *, whole: bool = False, arrays: bool = False) -> Iterator[Coverage]:
    """Judge outputs of which elements may be absent.

    Args:
        needed: what has a part in those that are there; None: everything may have.
        whole: whether none is.
        arrays: whether whole arrays are, and no others.
    """
    coverage = Coverage(whole=whole, arrays=arrays)
    tokens = _coverage.set(coverage), _needed.set(needed)
    try:
        yield coverage
    finally:
        _coverage.reset(tokens[0])
        _needed.reset(tokens[1])


def is_whole() -> bool:
    """Tell whether whoever judges has all elements, as long as no case says otherwise."""
    return _coverage.get() is None


def needed(experts: int, of_R: I64) -> tuple[Mask, Mask]:
    """Return which experts have all of their rows in an element that is there [E], and which rows are in one [R].

    Args:
        experts: how many there are.
        of_R: each row as `Needed.rows` counts it.
    """
    found = _needed.get()
    if found is None:
        return np.ones(experts, bool), np.ones(len(of_R), bool)
    return np.isin(np.arange(experts), list(found.experts)), np.isin(of_R, list(found.rows))


def never_shown(elements: int) -> None:
    """Count elements that no detector is shown, since none of them is there."""
    coverage = _coverage.get()
    if coverage is not None:
        coverage.shown += elements


def looked_at(judged: int, shown: int) -> None:
    """Count elements that were judged without `judgeable`: codes, experts."""
    coverage = _coverage.get()
    if coverage is not None:
        coverage.judged += judged
        coverage.shown += shown


def judgeable(got: Array, *expected: Array) -> Mask | None:
    """Return which elements can be judged; None: all of them, and so have their statistics.

    Args:
        got: what came back.
        expected: the oracle's value, and its bound; of the same shape.
    """
    coverage = _coverage.get()
    if coverage is None:
        return None
    seen = np.logical_not(is_absent(got), out=np.empty(got.shape, bool))  # an array even where there is one element
    if seen.any() and not coverage.whole:  # few are: only these are looked at
        seen[seen] = ~np.any([np.isnan(part[seen]) for part in expected], axis=0)
    coverage.judged += int(np.count_nonzero(seen))
    coverage.shown += seen.size
    return None if coverage.arrays and seen.all() else seen
