# SPDX-License-Identifier: Apache-2.0
"""One output as a recording holds it: samples, the worst elements, checksums of rows, a digest of everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hal_conformance import absent, sampling
from hal_conformance import arrays as codec
from hal_conformance.case import I64, Array
from hal_conformance.checksums import block_rows, checksums

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
        flat[np.concatenate([self.grid.indices, self.worst])] = self.values
        whole.flags.writeable = False
        return whole

    def held(self) -> tuple[I64, Array]:
        """Return flat indices and values of what both of two recordings hold if shape, dtype and seed are the same."""
        if self.grid is None:
            return np.arange(self.size), self.values
        return self.grid.indices, self.values[: self.grid.size]

    def content(self) -> tuple[object, ...]:
        """Return everything that is held, to look up by: a digest alone may say something else than the rest."""
        parts = (self.digest, codec.bits(self.values).tobytes(), self.worst.tobytes(), self.sums.tobytes())
        return (self.tag, self.shape, *parts)

    def contradicts(self, other: Packed) -> bool:
        """Return whether another array's digest says "the same", and what is held does not, or the other way round.

        An altered recording does that. Two honest ones do not: an element that differs shows in its row's checksum.
        """
        alike = (self.tag, self.shape) == (other.tag, other.shape) and np.array_equal(
            codec.bits(self.held()[1]), codec.bits(other.held()[1])
        )
        return (self.digest == other.digest) != (alike and np.array_equal(self.sums, other.sums))

    def held_rows(self) -> I64:
        """Return the rows of the first axis of which an element is held, sorted."""
        rows = (self.shape or (1,))[0]
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


def distance(a: Packed, b: Packed) -> tuple[float, float | None, str]:
    """Return the share of elements that differ in a bit, the largest absolute difference, and a remark.

    Of sampled outputs the share is that of what was sampled, and the remark says which rows differ in the whole.
    """
    if (a.tag, a.shape) != (b.tag, b.shape):
        return 1.0, None, f"{a.tag}{list(a.shape)} against {b.tag}{list(b.shape)}"
    (_, left), (_, right) = a.held(), b.held()
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
