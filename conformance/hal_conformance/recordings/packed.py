# SPDX-License-Identifier: Apache-2.0
"""One output as a recording holds it: samples, the worst elements, checksums of rows, a digest of everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hal_conformance import arrays as codec
from hal_conformance.case import I64, Array
from hal_conformance.numerics import absent
from hal_conformance.recordings import sampling
from hal_conformance.recordings.checksums import block_rows, checksum, checksums

_NARROW = ("uint8", "int16", "int32")
NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Packed:
    """What is known of one array.

    Attributes:
        tag: its dtype.
        shape: of the whole array.
        digest: SHA-256 of dtype, shape and every element (`arrays.digest`).
        finite: whether every element is finite.
        grid: which elements were sampled; None: all, and then there are no worst ones and no checksums.
        worst: flat indices of the elements that the recorder found worst, sorted.
        values: the elements of the grid, or all, and then the worst ones; one axis, dtype `tag`.
        sums: `checksums` of the whole array.
    """

    tag: str
    shape: tuple[int, ...]
    digest: bytes
    finite: bool
    grid: sampling.Grid | None
    worst: I64
    values: Array
    sums: npt.NDArray[np.uint32]

    @property
    def size(self) -> int:
        """Elements of the whole array."""
        return math.prod(self.shape)

    def array(self, limit: int) -> Array:
        """Return an array of the whole shape, in which what is not held is absent; read-only.

        Args:
            limit: bytes. Of a larger array there is only its shape: a forged one may be of any size.
        """
        if self.grid is None:
            return self.values.reshape(self.shape)
        dtype = codec.TAGS[self.tag]
        whole = absent.blank(self.shape, dtype)
        if self.size * dtype.itemsize > limit:
            return whole
        whole = np.array(whole)
        flat = whole.reshape(-1)
        flat[self.indices()] = self.values
        whole.flags.writeable = False
        return whole

    def indices(self) -> I64:
        """Return the flat index of each of `values`; of a worst element that was also sampled there are two."""
        return np.arange(self.size) if self.grid is None else np.concatenate([self.grid.indices, self.worst])

    def content(self) -> tuple[object, ...]:
        """Return everything that is held, to look up by: a digest alone may say something else than the rest."""
        parts = (self.digest, codec.bits(self.values).tobytes(), self.worst.tobytes(), self.sums.tobytes())
        return (self.tag, self.shape, self.finite, *parts)

    def contradicts(self, other: Packed) -> bool:
        """Tell whether another array's digest says "the same", and what both hold does not, or the other way round.

        An altered recording does that. Two honest ones do not: an element that differs shows in its row's checksum.
        (One that is held whole has no checksums. Another one, of which less is held, may agree with it in all of that.)
        """
        alike = (self.tag, self.shape, self.finite) == (other.tag, other.shape, other.finite)
        same = self.digest == other.digest
        if alike:
            alike = codec.same_bits(*common(self, other))
            if (self.grid is None) != (other.grid is None):
                return same and not alike
            alike = alike and np.array_equal(self.sums, other.sums)
        return same != alike

    def contradiction(self) -> str:
        """Return what is held that cannot all be true of one array, or nothing."""
        if self.grid is None:
            held, values = self.size, self.values
        else:
            indices = self.indices()
            places, first = np.unique(indices, return_index=True)
            held, values = len(places), self.values[first]
            if held < len(indices) and not codec.same_bits(values[np.searchsorted(places, indices)], self.values):
                return "one of the elements has two values"
        if held == self.size and codec.digest(values.reshape(self.shape)) != self.digest.hex():
            return "the elements do not have its digest"
        if self.grid is not None and (self.grid.columns is None or len(self.grid.columns) == self.grid.width):
            # Whole rows are held, and where these make up a block its checksum follows.
            together, rows = block_rows(self.shape), self.grid.rows
            width, sampled = self.grid.width, self.values[: self.grid.size]
            for block in np.unique(rows // together):
                inside = np.flatnonzero(rows // together == block)
                if len(inside) < min(together, self.shape[0] - block * together):
                    continue
                if checksum(sampled[inside[0] * width : (inside[-1] + 1) * width]) != self.sums[block]:
                    return f"row {block * together} does not have its checksum"
        return ""

    def held(self) -> tuple[I64, Array]:
        """Return flat indices and values of what every recording of this output holds: all, or the grid."""
        if self.grid is None:
            return np.arange(self.size), self.values
        return self.grid.indices, self.values[: self.grid.size]

    def held_rows(self) -> I64:
        """Return the rows of the first axis of which an element is held, sorted."""
        rows = (self.shape or (1,))[0]
        if not self.values.size:
            return np.arange(0)  # of an extent that may be enormous, where another is 0
        if self.grid is None:
            return np.arange(rows)
        return np.union1d(self.grid.rows, self.worst // self.grid.width)

    def differing_rows(self, other: Packed) -> tuple[str, int]:
        """Return which rows differ from those of another array of this shape, as text, and how many rows there are."""
        rows, together = (self.shape or (1,))[0], 1
        if self.grid is None:
            indices, values = self.held()
            changed = codec.bits(values) != codec.bits(other.values)
            differing = np.unique(indices[changed] // max(1, self.size // max(1, rows)))
        else:
            together = block_rows(self.shape)
            differing = np.flatnonzero(self.sums != other.sums)
        texts = [str(i) if together == 1 else f"{i * together}-{min(rows, (i + 1) * together) - 1}" for i in differing]
        return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else ""), rows


def pack(name: str, array: Array, seed: int, worst: I64 = NONE, digest: str = "") -> Packed:
    """Return what a recording holds of an output.

    Args:
        name: of the output.
        array: the whole of it.
        seed: of the inputs.
        worst: flat indices of elements to hold in any case.
        digest: of the array, if the caller has it already.
    """
    tag = codec.tag_of(array)
    flat = np.ascontiguousarray(array).reshape(-1)
    real = absent.can_be_absent(array.dtype)
    finite = not real or codec.all_finite(flat)
    grid = sampling.grid(name, array.shape, seed) if real else None
    sha = bytes.fromhex(digest or codec.digest(array))
    if grid is None:
        return Packed(tag, array.shape, sha, finite, None, NONE, flat, np.zeros(0, np.uint32))
    values = flat[np.concatenate([grid.indices, worst])]
    return Packed(tag, array.shape, sha, finite, grid, worst, values, checksums(array))


def narrow(values: Array) -> Array:
    """Return integers in the smallest dtype that holds them, which has a tag; anything else as it is."""
    if values.dtype.kind not in "iu" or absent.can_be_absent(values.dtype) or not values.size:
        return values
    low, high = int(values.min()), int(values.max())
    for tag in _NARROW:
        limits = np.iinfo(tag)
        if limits.min <= low and high <= limits.max:
            return values.astype(tag)
    return values


def common(a: Packed, b: Packed) -> tuple[Array, Array]:
    """Return the values that both of two arrays of one dtype and shape hold, in the same order."""
    if a.grid is None and b.grid is None:
        return a.values, b.values
    ours, theirs = a.indices(), b.indices()
    if np.array_equal(ours, theirs):
        return a.values, b.values
    _, left, right = np.intersect1d(ours, theirs, return_indices=True)
    return a.values[left], b.values[right]


def distance(a: Packed, b: Packed) -> tuple[float, float | None, str]:
    """Return the share of elements that differ in a bit, the largest absolute difference, and a remark.

    Of sampled outputs the share is that of what both hold, and the remark says which rows differ in the whole.
    """
    if (a.tag, a.shape) != (b.tag, b.shape):
        return 1.0, None, f"{a.tag}{list(a.shape)} against {b.tag}{list(b.shape)}"
    left, right = common(a, b)
    changed = codec.bits(left) != codec.bits(right)
    with np.errstate(all="ignore"):
        gap = np.abs(_wide(left) - _wide(right))[changed]
    worst = float(np.max(gap, initial=0.0))
    share = float(np.count_nonzero(changed)) / max(1, changed.size)
    rows, of = a.differing_rows(b)
    remark = f"rows {rows} of {of}" if rows and of > 1 else ""
    if not math.isfinite(worst):
        return share, None, "; ".join(filter(None, (remark, "not finite in one of them")))
    return share, worst, remark


def _wide(array: Array) -> npt.NDArray[Any]:
    return array.astype(np.float64)
