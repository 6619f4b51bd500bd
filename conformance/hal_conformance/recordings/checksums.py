# SPDX-License-Identifier: Apache-2.0
"""One number for each row of an array, so that two hosts can tell which rows differ without having them.

    c = the upper 32 bits of (sum over i of w_i bits_i) mod 2^64, with an odd weight w_i for each place in the row

A change of one element changes the sum for certain, since an odd number has an inverse mod 2^64; that it stays
within the lower half has odds of 2^-31. Two elements that change places change it, too: XOR and plain sums, which
hash functions for tensors often are, see neither that nor two equal rows that vanish together. Arrays of many rows
have one number for each of up to `BLOCKS` blocks of neighbouring rows.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from hal_conformance.case import Array

BLOCKS = 16


def block_rows(shape: tuple[int, ...]) -> int:
    """Return how many rows of the first axis share a number."""
    return max(1, -(-shape[0] // BLOCKS))


def count(shape: tuple[int, ...]) -> int:
    """Return how many numbers an array of that shape has."""
    return -(-shape[0] // block_rows(shape))


def checksums(array: Array) -> npt.NDArray[np.uint32]:
    """Return the numbers of an array with at least one axis."""
    together = block_rows(array.shape)
    flat = np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(-1)
    step = together * math.prod(array.shape[1:])
    starts = range(0, flat.size, step) if step else ()
    found = np.zeros(count(array.shape), np.uint64)
    for at, start in enumerate(starts):
        found[at] = _sum(flat[start : start + step])
    upper: npt.NDArray[np.uint32] = (found >> np.uint64(32)).astype(np.uint32)
    return upper


def checksum(block: Array) -> int:
    """Return the number of the rows that share one."""
    return _sum(np.ascontiguousarray(block).view(f"u{block.itemsize}").reshape(-1)) >> 32


_PIECE = 1 << 16
"""Elements that are taken at once: a row may be as long as a forged recording says."""


def _sum(bits: Array) -> int:
    found = 0
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE].astype(np.uint64)
        found += int((piece * _weights(start)[: piece.size]).sum(dtype=np.uint64))
    return found % 2**64


@functools.lru_cache(maxsize=64)
def _weights(start: int) -> npt.NDArray[np.uint64]:
    """Return odd weights for the places from `start` on, by the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = np.arange(start + 1, start + _PIECE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((z ^ (z >> np.uint64(31))) | np.uint64(1))
