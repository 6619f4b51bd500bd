# SPDX-License-Identifier: Apache-2.0
"""Generated inputs: the same bits on every host, from an integer counter generator.

Only integer operations, single float additions, multiplications, divisions and square roots are used, which
IEEE 754 rounds in one way only. Never a float sum over an axis: numpy's order of summation depends on the
host's vector width.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import ParamSpec

import ml_dtypes
import numpy as np

from hal import philox
from hal_conformance.case import F64, I64, Array
from hal_conformance.kept import Kept

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}

BYTE_SUM_DEVIATION = math.sqrt(4 * (256**2 - 1) / 12)  # of the sum of four uniform bytes


_MADE = Kept(64 << 20)


def bits(seed: int, stream: str, n: int, offset: int = 0) -> Array:
    """Return `philox.bits`, read-only: neighbouring cases, and the dtypes of one case, are made of the same words."""
    return _MADE.get((seed, stream, n, offset), lambda: philox.bits(seed, stream, n, offset=offset))


Given = ParamSpec("Given")


def _remembered(make: Callable[Given, Array]) -> Callable[Given, Array]:
    """Keep what a function made, and return copies: cases of a family, and dtypes, begin with the same inputs."""

    @functools.wraps(make)
    def known(*args: Given.args, **named: Given.kwargs) -> Array:
        key = make.__name__, args, tuple(sorted(named.items()))
        made: Array = _MADE.get(key, lambda: make(*args, **named)).copy()
        return made

    return known


def words(seed: int, stream: str, *shape: int, first: int = 0) -> I64:
    """Return uniform integers in [0, 2**32): the part of a larger array that begins at `first` of its first axis."""
    offset = first * math.prod(shape[1:])
    return bits(seed, stream, math.prod(shape), offset).astype(np.int64).reshape(shape)


def integers(seed: int, stream: str, low: int, high: int, *shape: int, first: int = 0) -> I64:
    """Return uniform integers in [low, high]; the modulo's bias is below 1e-6 for the ranges used here."""
    return low + words(seed, stream, *shape, first=first) % (high - low + 1)


@_remembered
def permutation(seed: int, stream: str, n: int) -> I64:
    """Return a random order of 0..n-1."""
    return np.argsort(words(seed, stream, n), kind="stable")


def normal(seed: int, stream: str, *shape: int, first: int = 0) -> F64:
    """Return nearly normal numbers, mean 0, variance 1: sums of four bytes (exact), cut at 3.5 deviations.

    A quarter of the cost of true normals, and the cut keeps float16 products finite. The heavy tails that matter
    are put into `activations` on purpose.
    """
    word = bits(seed, stream, math.prod(shape), first * math.prod(shape[1:]))
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    total = (pairs & 0xFFFF) + (pairs >> 16)
    return ((total - 510.0) / BYTE_SUM_DEVIATION).reshape(shape)


def store(values: Array, dtype: str) -> Array:
    """Round to a storage dtype, to nearest, ties to even."""
    return (
        np.asarray(values, np.float64).astype(NUMPY_DTYPES[dtype])
        if dtype != "bfloat16"
        else np.asarray(values, np.float32).astype(NUMPY_DTYPES[dtype])
    )


def outlier_channels(width: int) -> int:
    """How many of `width` channels are outliers: about one in 256, as in trained transformers, at least one."""
    return max(1, width // 256)


@_remembered
def activations(seed: int, stream: str, tokens: int, width: int) -> F64:
    """Return [T, D] activations as they occur in a trained transformer, before rounding to a dtype.

    Most elements are normal times a heavy-tailed factor 1/sqrt(u), 1 to 8 (Student's t with two degrees of freedom,
    cut). A few channels, at places that the seed chooses, hold 20 to 60 times that with nearly the same
    value in every token.

    Source: Dettmers et al. 2022 (arXiv:2208.07339), Sun et al. 2024 (arXiv:2402.17762).
    """
    u = (words(seed, f"{stream}/tail", tokens, width) + 2**26) / 2.0**32
    x = normal(seed, f"{stream}/body", tokens, width) / np.sqrt(u)
    count = outlier_channels(width)
    channels = permutation(seed, f"{stream}/places", width)[:count]
    size = integers(seed, f"{stream}/sizes", 20, 60, count) * (1 - 2 * integers(seed, f"{stream}/signs", 0, 1, count))
    x[:, channels] = size * (1.0 + normal(seed, f"{stream}/wobble", tokens, count) / 16.0)
    return np.asarray(x)


def typical_norm(width: int) -> float:
    """Expected Euclidean norm of a row of `activations`: E[1/u] = ln(2**6) for the body, 42**2 for an outlier."""
    return math.sqrt(width * math.log(64.0) + outlier_channels(width) * 42.0**2)


@_remembered
def gate(seed: int, stream: str, experts: int, width: int) -> F64:
    """Return [E, D] router weights whose margins look like a trained router's.

    Rows share a common part and a part per cluster of four, so that a token's likely experts are similar; every
    eighth row nearly repeats the one before (relative distance 2**-13), so that some tokens are near-tied. Logits
    have a standard deviation of about 2.
    """
    own = normal(seed, f"{stream}/own", experts, width)
    cluster = normal(seed, f"{stream}/cluster", -(-experts // 4), width)
    common = normal(seed, f"{stream}/common", 1, width)
    rows = 0.5 * common + 0.7 * np.repeat(cluster, 4, axis=0)[:experts] + 0.7 * own
    near = np.arange(7, experts, 8)
    rows[near] = rows[near - 1] * (1.0 + normal(seed, f"{stream}/near", len(near), width) * 2.0**-13)
    order = permutation(seed, f"{stream}/order", experts)
    return np.asarray(rows[order] * (2.0 / typical_norm(width)))


def weights(seed: int, stream: str, *shape: int, first: int = 0) -> F64:
    """Return normal weights with variance 1 / (size of the last axis)."""
    return normal(seed, stream, *shape, first=first) / math.sqrt(shape[-1])


def sparse(seed: int, stream: str, ones: int, values: int, *shape: int, first: int = 0) -> F64:
    """Return integers in [-values, values] with at most `ones` nonzero in each row of the last axis."""
    # A stable argsort, in half of its time: numbers with their places, no two of which are equal, are sorted as values.
    keyed = (words(seed, f"{stream}/keep", *shape, first=first) << 20) | np.arange(shape[-1])
    keyed.sort(axis=-1)
    order = keyed & (2**20 - 1)
    keep = order < min(ones, shape[-1])
    return np.where(keep, integers(seed, stream, -values, values, *shape, first=first), 0).astype(np.float64)


def low_bits(seed: int, stream: str, *shape: int, first: int = 0) -> F64:
    """Return factors that fill the low bits of float32; a sum of four bytes alone ends in zeros."""
    return np.asarray(1.0 + words(seed, f"{stream}/low", *shape, first=first) * 2.0**-34)


def full_bits(seed: int, stream: str, *shape: int, first: int = 0) -> F64:
    """Return weights that use all 24 bits of float32."""
    return weights(seed, stream, *shape, first=first) * low_bits(seed, stream, *shape, first=first)


SLAB = 2**22
"""Elements that are made at a time: all experts of a published model in float64 would not fit in memory."""


_KEPT = Kept(128 << 20)


def by_expert(key: Hashable, dtype: str, shape: tuple[int, ...], part: Callable[[int, int], F64]) -> Array:
    """Return [E, ...] in a storage dtype, from `part(first, count)`, which makes some experts; read-only.

    Args:
        key: names what `part` makes, whatever the dtype.
        dtype: of storage.
        shape: of the whole.
        part: called with the first expert and how many.
    """

    def make() -> Array:
        made = np.empty(shape, NUMPY_DTYPES[dtype])
        step = max(1, SLAB // math.prod(shape[1:]))
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            wide = _KEPT.get((key, shape, first, count), functools.partial(part, first, count))
            made[first : first + count] = store(wide, dtype)
        return made

    return _KEPT.get((key, shape, dtype), make)


def expert_weights(seed: int, stream: str, dtype: str, *shape: int, gate: bool = False) -> Array:
    """Return `weights` of shape [E, ...] in a storage dtype; those of a gate projection are `steep` in part."""

    def part(first: int, n: int) -> F64:
        made = weights(seed, stream, n, *shape[1:], first=first)
        return made * steep(n, first) if gate else made

    return by_expert((seed, stream, gate), dtype, shape, part)


@_remembered
def choices(seed: int, stream: str, tokens: int, experts: int, top_k: int) -> I64:
    """Return [T, K] distinct experts for every token, with the uneven load of a trained router.

    A quarter of the experts is four times as likely as the rest; expert `hot` is in every second token, expert
    `cold` in none, expert `single` in one token only (where E and K leave room for it).
    """
    word = words(seed, f"{stream}/draw", tokens, experts)
    order = permutation(seed, f"{stream}/roles", experts)
    word[:, order[: max(1, experts // 4)]] //= 4
    word[::2, order[0]] = -2
    if experts > top_k:
        word[:, order[-1]] = 2**40
    if experts > top_k + 1 and tokens:
        word[:, order[-2]] = 2**39
        word[-1, order[-2]] = -3  # before the hot expert: one choice is enough
    return np.argsort(word, axis=1, kind="stable")[:, :top_k].astype(np.int64)


EDGES = (0, 1, 17, 65, 129, 32, 64, 128)
"""Row counts that fill the usual tiles of 32, 64 and 128 rows, or exceed them by one, and no rows."""


def sweep_counts(seed: int, stream: str, experts: int, rows: int) -> I64:
    """Return [E] row counts, permuted: kernels lose tails at particular residues of a count, so every one is wanted.

    0 to 32, 64, 65, 128 and 129 where there are experts enough, otherwise `EDGES` and what the seed says. Experts
    beyond these have up to twice what is left of `rows` for each of them.

    Whatever the seed, an expert at one end is empty, and its neighbour and the other end have rows: the first is where
    E is a multiple of 64, the last otherwise.
    """
    swept = [*range(33), 64, 65, 128, 129]
    if experts >= len(swept):
        rest = experts - len(swept)
        share = max(1, (rows - sum(swept)) // max(1, rest))
        counts = np.array(swept + [i % (2 * share + 1) for i in range(rest)])
    else:
        counts = integers(seed, f"{stream}/few", 0, 31, experts)
        counts[: len(EDGES)] = EDGES[:experts]
    inner = np.sort(counts)[1:][permutation(seed, f"{stream}/order", experts - 1)]
    for end in (0, -1):
        busy = int(np.flatnonzero(inner)[end])
        inner[[end, busy]] = inner[[busy, end]]
    return np.asarray(np.insert(inner, 0 if experts % 64 == 0 else len(inner), 0), np.int64)


STEEP = 6.0
"""Scale of every third expert's gate projection, so that its pre-activations reach into silu's tails."""


def steep(experts: int, first: int = 0) -> F64:
    """Return [E, 1, 1] factors of the gate projections: 1, or `STEEP` for every third expert."""
    return np.where((first + np.arange(experts)) % 3 == 2, STEEP, 1.0)[:, None, None]


def with_one(array: Array, bad: float, seed: int, stream: str, at: int | None = None) -> Array:
    """Return a copy of an array in which one element is `bad`.

    Args:
        array: contiguous.
        bad: NaN or an infinity.
        seed, stream: they choose the element.
        at: index on the first axis among whose elements it is; None: among all.
    """
    changed: Array = array.copy()
    flat = (changed if at is None else changed[at]).reshape(-1)
    flat[integers(seed, stream, 0, flat.size - 1, 1)] = bad
    return changed
