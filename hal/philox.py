# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers with the same bits on every host and every device.

Philox4x32-10 (Salmon et al., SC'11; the generator behind cuRAND, JAX's and torch's CUDA streams) maps a key and
a counter to four 32-bit words by ten rounds of integer multiplication, so any element of a stream can be had
without the ones before it, on any device that multiplies integers.

Layout: the key is the 64-bit seed, the upper half of the counter is the stream's 64-bit number, the lower half
counts blocks of four words.

`normal` uses only integer operations and float64 additions, multiplications, divisions and square roots, which
IEEE 754 rounds in one way only; no library logarithm, whose last bit differs between hosts.
"""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING

from hal.arguments import integer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    U32 = npt.NDArray[np.uint32]
    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: they change the key from round to round
MASK = 0xFFFFFFFF
MOST = 2**64 - 1
"""The largest seed, number of a stream, and position in one."""


def stream_number(stream: str | int) -> int:
    """Return the 64-bit number of a stream; a name is hashed with SHA-256, an integer is taken as it is.

    Raises:
        ConfigError: neither a text nor an integer in [0, 2**64).
    """
    if isinstance(stream, str):
        return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return integer("the stream", stream, 0, MOST)


CACHED = 2**14
"""Blocks that are made at a time: what a round leaves stays in a processor's cache, and many take half of the time."""


def round_keys(seed: int) -> list[tuple[int, int]]:
    """Return the ten round keys of a seed.

    Raises:
        ConfigError: the seed is no integer in [0, 2**64).
    """
    seed = integer("the seed", seed, 0, MOST)
    low, high = seed & MASK, seed >> 32
    return [((low + i * WEYL[0]) & MASK, (high + i * WEYL[1]) & MASK) for i in range(ROUNDS)]


def blocks(seed: int, stream: int, first: int, count: int) -> U32:
    """Return [count, 4] words: the blocks `first`, `first + 1`, ... of a stream."""
    import numpy as np

    if count > CACHED:
        parts = (blocks(seed, stream, first + at, min(CACHED, count - at)) for at in range(0, count, CACHED))
        return np.concatenate(list(parts))
    # Only the products need 64 bits. Their halves are seen in place, so that a round writes each word once: this takes
    # half of the time of shifts and masks. The two products of a round are one operation: most streams are short.
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    index = np.arange(first, first + count, dtype=np.uint64).view(np.uint32)
    even, odd = np.empty((2, count), np.uint32), np.empty((2, count), np.uint32)  # words 0 and 2; 1 and 3
    even[0], odd[0] = index[low::2], index[high::2]
    even[1], odd[1] = stream & MASK, stream >> 32
    multipliers = np.array(MULTIPLIERS, np.uint64)[:, None]
    products = np.empty((2, count), np.uint64)
    crossed = products.view(np.uint32)[::-1]  # either product becomes the other's words
    for key in np.array(round_keys(seed), np.uint32)[:, :, None]:
        np.multiply(even, multipliers, out=products)
        np.bitwise_xor(crossed[:, high::2], odd, out=even)
        even ^= key
        odd[:] = crossed[:, low::2]
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=1)


def bits(seed: int, stream: str | int, n: int, *, offset: int = 0) -> U32:
    """Return `n` uniformly random 32-bit words, elements `offset` to `offset + n` of the stream.

    Args:
        seed: in [0, 2**64).
        stream: name or number; different streams are independent.
        n: how many; 0 gives an empty array.
        offset: first element.

    Raises:
        ConfigError: the seed or the stream is none, or the elements do not lie in [0, 2**64).
    """
    n, offset = integer("n", n, 0), integer("the offset", offset, 0)
    integer("the offset of the last element", offset + n, 0, MOST)
    first = offset // 4
    count = -(-(offset + n) // 4) - first
    words = blocks(seed, stream_number(stream), first, count).reshape(-1)
    return words[offset - 4 * first :][:n]


def uniform(seed: int, stream: str | int, n: int, *, offset: int = 0) -> F32:
    """Return `n` float32 in [0, 1), multiples of 2**-24, so that each is exact in float32."""
    import numpy as np

    words: F32 = (bits(seed, stream, n, offset=offset) >> np.uint32(8)).astype(np.float32)
    return np.asarray(words * np.float32(2.0**-24))


def normal(seed: int, stream: str | int, n: int, *, offset: int = 0) -> F32:
    """Return `n` float32 from N(0, 1), by inversion; one word each, so |z| is at most 6.34.

    Source: algorithm AS 241 (PPND16), Wichura 1988; its relative error is about 1e-16, below float32's rounding.
    """
    import numpy as np

    p = (bits(seed, stream, n, offset=offset).astype(np.float64) + 0.5) * 2.0**-32
    return _inverse_normal(p).astype(np.float32)


# Coefficients of AS 241, lowest power first: numerator and denominator for the centre and the two tails.
_CENTRE = (
    (
        3.3871328727963666080,
        133.14166789178437745,
        1971.5909503065514427,
        13731.693765509461125,
        45921.953931549871457,
        67265.770927008700853,
        33430.575583588128105,
        2509.0809287301226727,
    ),
    (
        1.0,
        42.313330701600911252,
        687.18700749205790830,
        5394.1960214247511077,
        21213.794301586595867,
        39307.895800092710610,
        28729.085735721942674,
        5226.4952788528545610,
    ),
)
_TAIL = (
    (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
     1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
     0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: F64) -> F64:
    import numpy as np

    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _log(x: F64) -> F64:
    """Natural logarithm of positive normal numbers, from correctly rounded operations only.

    x = m * 2**e with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172, and the
    series is cut after s**21, where the next term is below 1e-18.
    """
    import numpy as np

    m, e = np.frexp(x)
    small = m < 0.7071067811865476
    m, e = np.where(small, 2.0 * m, m), e - small
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(tuple(1.0 / k for k in range(1, 22, 2)), s * s)
    return np.asarray(2.0 * s * series + e * 0.6931471805599453)


def _inverse_normal(p: F64) -> F64:
    import numpy as np

    q = p - 0.5
    centre = 0.180625 - q * q
    inner = q * _polynomial(_CENTRE[0], centre) / _polynomial(_CENTRE[1], centre)
    # For p >= 2**-33, sqrt(-log p) is below 4.79, within the first tail's range of 5.
    r = np.sqrt(-_log(np.minimum(p, 1.0 - p))) - 1.6
    outer = _polynomial(_TAIL[0], r) / _polynomial(_TAIL[1], r)
    return np.where(np.abs(q) <= 0.425, inner, np.where(q < 0, -outer, outer))
