# SPDX-License-Identifier: Apache-2.0
"""Whole products of random numbers, to be compared bit by bit with those of a rule.

Questions find what somebody thought of asking. That a device follows a rule is said only when this finds nothing else.

Shapes: M rows, N columns, K products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hal import philox
from hal.errors import HalError
from hal.matrix_unit import FORMATS, MatrixUnit
from hal.probe.evaluated import F64, evaluated
from hal.probe.multiplier import OUTER, Multiplier, bits
from hal.probe.schedule import Pieces

SEED = 6
LONG = 512
"""A second inner length, at which K may be shared out; of one kind, since it takes long."""

ROWS = 16
"""That are compared, evenly spaced; of float64, and of `LONG`, one."""


@dataclass(frozen=True)
class Products:
    """The products of one format.

    Attributes:
        formats: of the operands.
        results: by K and kind of numbers, those rows that are compared.
        digest: of all their bits.
    """

    formats: tuple[str, str]
    results: Mapping[tuple[int, str], torch.Tensor]
    digest: str


def products(multiply: Multiplier, inner: int) -> Products:
    """Compute products of all kinds of numbers on a device."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    digest = hashlib.sha256()
    for K, kind in _asked(inner):
        a, b = operands(multiply.formats, kind, multiply.outer, K)
        try:
            whole = multiply.raw(torch.from_numpy(a), torch.from_numpy(b))
        except (RuntimeError, HalError):
            continue  # a shape that this product does not take
        digest.update(bits(whole).numpy().tobytes())
        found[K, kind] = whole[_rows(multiply.format, K, len(whole))]
    return Products(multiply.formats, found, digest.hexdigest()[:12])


def differing(
    found: Products, unit: MatrixUnit, pieces: Mapping[int, Pieces | None], outer: int = OUTER
) -> tuple[int, int]:
    """Return how many elements a rule has otherwise, of how many.

    Args:
        found: a device's products.
        unit: the rule.
        pieces: in which it sums K, by length; a length without any is left out.
        outer: of the products.
    """
    others = elements = 0
    for (K, kind), result in found.results.items():
        shared = pieces.get(K)
        if shared is None:
            continue
        a, b = operands(found.formats, kind, outer, K)
        rows = a[_rows(found.formats[0], K, outer)]
        want = torch.from_numpy(evaluated(rows, b, unit, found.formats, shared)).to(result.dtype)
        others += int((bits(want) != bits(result)).sum())
        elements += want.numel()
    return others, elements


def _asked(inner: int) -> list[tuple[int, str]]:
    return [*((inner, kind) for kind in KINDS), *([(LONG, "cancelling")] if inner != LONG else [])]


def _rows(format: str, K: int, outer: int) -> slice:
    """Return evenly spaced rows."""
    count = 1 if K == LONG or format == "float64" else ROWS
    return slice(None, None, max(1, outer // count))


# Numbers -------------------------------------------------------------------------------------------------------------


def operands(formats: tuple[str, str], kind: str, outer: int, K: int) -> tuple[F64, F64]:
    """Return a [outer, K] and b [K, outer] of each one's format, the same on every host."""
    stream = f"{formats[0]}/{kind}/{K}"
    a, b = (philox.normal(SEED, f"{side}/{stream}", outer * K).astype(np.float64).reshape(outer, K) for side in "ab")
    for x, side, (low, high) in zip((a, b), "ab", _exponents(formats, kind), strict=True):
        spread = philox.uniform(SEED, f"spread of {side}/{stream}", outer * K).reshape(outer, K)
        np.ldexp(x, low + np.floor(spread * (high - low + 1)).astype(np.int64), out=x)
    a, b = _of(formats[0], a), _of(formats[1], b).T
    if kind in ("independent", "subnormal"):
        return a, np.ascontiguousarray(b)
    # Each product a second time with the other sign, all in random places: what is left is rounding alone.
    half = K // 2
    places = np.argsort(philox.uniform(SEED, f"places of {stream}", K), kind="stable")
    alone = np.zeros((outer, K % 2))
    a, b = np.hstack([a[:, :half], -a[:, :half], alone]), np.vstack([b[:half], b[:half], alone.T])
    return np.ascontiguousarray(a[:, places]), b[places]


KINDS = ("independent", "cancelling", "wide", "subnormal")
"""Independent normal numbers; such that the exact product is zero; the same with exponents far apart; the smallest
numbers of the format, with large ones."""

_WIDE = {
    "float16": (-8, 8), "float8_e4m3fn": (-9, 6), "float8_e4m3fnuz": (-9, 5), "float8_e5m2": (-15, 12),
    "float8_e5m2fnuz": (-15, 12),
}  # fmt: skip
"""Exponents that are far apart; -20 to 20 in wider formats."""

_SMALL = {
    "float64": 800, "float16": 12, "float8_e4m3fn": 6, "float8_e4m3fnuz": 5, "float8_e5m2": 12, "float8_e5m2fnuz": 12,
}  # fmt: skip
"""Binades of the numbers that the smallest ones are multiplied with."""


def _exponents(formats: tuple[str, str], kind: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the least and the largest power of two that a's, and b's normal numbers are multiplied with.

    Sums of short numbers that are close together are exact: it takes some spread to see how they are rounded.
    """
    if kind == "cancelling":
        return (-3, 3), (-3, 3)
    if kind == "wide":
        of_a, of_b = (_WIDE.get(format, (-20, 20)) for format in formats)
        return of_a, of_b
    if kind == "subnormal":
        numbers = FORMATS[formats[0]]
        # b is as large as results need, which are far above what models disagree about.
        up = _SMALL.get(formats[1], 100)
        return (numbers.min_exponent - numbers.bits + 2, numbers.min_exponent + 1), (up - 12, up)
    return (0, 0), (0, 0)


def _of(format: str, x: F64) -> F64:
    """Return the nearest numbers of a format."""
    numbers = FORMATS[format]
    last = np.maximum(np.frexp(x)[1] - 1, numbers.min_exponent) - numbers.bits + 1
    return np.asarray(np.ldexp(np.rint(np.ldexp(x, -last)), last), np.float64)
