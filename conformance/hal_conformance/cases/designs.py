# SPDX-License-Identifier: Apache-2.0
"""Inputs of the experts. Each exact design is blind to something, so all are run.

Small integers show lost and swapped rows and the rounding of the output; cancelling integers show accumulators of too
few bits; one-hot rows show every bit of every weight, and inputs cut to TF32. In all of them one channel of x is 1 and
alone feeds the gate.

Legend: R routed rows, D model dim, F expert hidden dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import F64, I64, Array, Arrays
from hal_conformance.numerics.bounds import SIGNIFICANDS

ONE = 64.0
"""A gate value whose sigmoid is 1 - 1.6e-28, which is 1 in float32 and in float64: silu(64) is 64, its slope 1."""


@dataclass(frozen=True)
class Size:
    """Sizes of one call: rows per expert, D, F; and the dtype and seed."""

    counts_E: I64
    width: int
    hidden: int
    dtype: str
    seed: int

    @property
    def rows(self) -> int:
        """R."""
        return int(self.counts_E.sum())

    @property
    def up(self) -> tuple[int, int, int]:
        """The shape of w1 and w3."""
        return len(self.counts_E), self.hidden, self.width

    @property
    def down(self) -> tuple[int, int, int]:
        """The shape of w2."""
        return len(self.counts_E), self.width, self.hidden

    def arrays(self, x_RD: F64, w1_EFD: Array, w3_EFD: Array, w2_EDF: Array) -> Arrays:
        """Return the inputs of the experts, stored."""
        return {
            "x_RD": make.store(x_RD, self.dtype), "counts_E": self.counts_E,
            "w1_EFD": w1_EFD, "w3_EFD": w3_EFD, "w2_EDF": w2_EDF,
        }  # fmt: skip

    def made(self, name: str, shape: tuple[int, ...], part: Callable[[int, int], F64]) -> Array:
        """Return the weights of one name, in the dtype."""
        return make.by_expert((self.seed, name), self.dtype, shape, part)

    def channel(self, design: str) -> int:
        """Return the channel that feeds the gate."""
        return int(make.permutation(self.seed, f"{design}/channel", self.width)[0])

    def gate(self, channel: int) -> Array:
        """Return a w1 that makes every gate `ONE` where x is 1 in the channel."""
        w1 = np.zeros(self.up, make.NUMPY_DTYPES[self.dtype])
        w1[:, :, channel] = ONE
        return w1


def as_it_occurs(size: Size) -> Arrays:
    """Heavy tails and outlier channels, scaled to unit variance as after a norm."""
    seed, dtype = size.seed, size.dtype
    x = make.activations(seed, "experts/x", size.rows, size.width)
    return size.arrays(
        x * (np.sqrt(size.width) / make.typical_norm(size.width)),
        make.expert_weights(seed, "experts/w1_EFD", dtype, *size.up, gate=True),
        make.expert_weights(seed, "experts/w3_EFD", dtype, *size.up),
        make.expert_weights(seed, "experts/w2_EDF", dtype, *size.down),
    )


def integers(size: Size) -> Arrays:
    """Small integers; the output needs rounding in the 16-bit dtypes.

    u sums at most 14 products of up to 9, at most 126: exact in bfloat16. h = 64 u. y sums four of those times at most
    2: at most 64,512, below float16's largest, in multiples of 64, so every partial sum is exact in float32.
    """
    seed, channel = size.seed, size.channel("integers")
    x = make.integers(seed, "integers/x", -3, 3, size.rows, size.width).astype(np.float64)
    x[:, channel] = 1.0
    up, down = size.up[1:], size.down[1:]
    return size.arrays(
        x, size.gate(channel),
        size.made("integers/w3", size.up, lambda e, n: make.sparse(seed, "integers/w3", 14, 3, n, *up, first=e)),
        size.made("integers/w2", size.down, lambda e, n: make.sparse(seed, "integers/w2", 4, 2, n, *down, first=e)),
    )  # fmt: skip


def cancelling(size: Size) -> Arrays:
    """Integers whose partial sums are large and whose sums are small.

    Channels come in pairs with equal weights: v and d - v, v up to 126 in size, d in -1, 0, 1. A sum over 24 pairs has
    partial sums of hundreds and a result of at most 24; an accumulator of 8 or 11 bits loses the d's. In the second
    product the same is done with pairs of equal hidden units and weights w and 1 - w.
    """
    seed, order = size.seed, make.permutation(size.seed, "cancel/order", size.width)
    channel, pairs = int(order[0]), (size.width - 1) // 2
    left, right = order[1 : 1 + pairs], order[1 + pairs : 1 + 2 * pairs]
    v = make.integers(seed, "cancel/v", -126, 126, size.rows, pairs)
    x = np.zeros((size.rows, size.width))
    x[:, left], x[:, right] = v, make.integers(seed, "cancel/d", -1, 1, size.rows, pairs) - v
    x[:, channel] = 1.0
    units, half = make.permutation(seed, "cancel/units", size.hidden), size.hidden // 2
    a, b = units[:half], units[half : 2 * half]

    def up(first: int, n: int) -> F64:
        w3 = np.zeros((n, *size.up[1:]))
        w3[:, :, left] = w3[:, :, right] = make.sparse(seed, "cancel/w3", 24, 1, n, size.hidden, pairs, first=first)
        w3[:, b] = w3[:, a]  # equal hidden units in pairs
        return w3

    def down(first: int, n: int) -> F64:
        w2 = np.zeros((n, *size.down[1:]))
        big = make.sparse(seed, "cancel/w2", 8, 60, n, size.width, half, first=first)
        w2[:, :, a], w2[:, :, b] = big, (big != 0) - big
        return w2

    return size.arrays(
        x, size.gate(channel), size.made("cancel/w3", size.up, up), size.made("cancel/w2", size.down, down)
    )


def one_hot(size: Size) -> Arrays:
    """Rows that pick single weights, so that the output is the weights themselves.

    Row r of an expert is 1 in one channel j(r) of its own and in the channel c that all rows share. Each expert shows
    one of its matrices; f(d) is a hidden unit that the seed picks for output channel d:
      - 0, up: the gate is 64 through c, so y[d] = 64 w3[f(d), j].
      - 1, gate: u is 1 through c and w2 picks f(d), so y[d] = w1[f(d), j], from 64 to 128, where silu is the identity.
        In the 16-bit dtypes odd units add 64 through c, which needs rounding: a gate whose store truncates is seen.
        (In float32 the sum itself would round, which a contract may do in its own way.)
      - 2, down: w1 opens the unit j mod F alone and u is 1/64, so h is one-hot and y[d] = w2[d, j mod F].
    Every bit that is read shows, and so does an input cut to fewer bits.
    """
    seed, channel = size.seed, size.channel("onehot")
    others = np.delete(np.arange(size.width), channel)
    x = np.zeros((size.rows, size.width))
    x[np.arange(size.rows), others[np.arange(size.rows) % len(others)]] = 1.0
    x[:, channel] = 1.0
    pick = make.integers(seed, "onehot/pick", 0, size.hidden - 1, size.width)
    unit = np.arange(size.width) % size.hidden

    def role(which: int, first: int, n: int) -> tuple[I64, int]:
        """Return the places, among `n` experts from `first`, of those that show a matrix; and their first number."""
        at = np.flatnonzero((np.arange(first, first + n)) % 3 == which)
        return at, (first + int(at[0])) // 3 if len(at) else 0

    def gate(first: int, n: int) -> F64:
        w1 = np.zeros((n, *size.up[1:]))
        up, _ = role(0, first, n)
        w1[up, :, channel] = ONE
        shown, number = role(1, first, n)
        fraction = make.words(seed, "onehot/w1", len(shown), *size.up[1:], first=number) * 2.0**-32
        w1[shown] = ONE * (1.0 + fraction)
        w1[shown, :, channel] = 0.0
        if size.dtype != "float32":
            w1[shown, 1::2, channel] = ONE
        down, _ = role(2, first, n)
        w1[down[:, None], unit[others], others] = ONE
        return w1

    def up(first: int, n: int) -> F64:
        w3 = np.zeros((n, *size.up[1:]))
        shown, number = role(0, first, n)
        w3[shown] = make.full_bits(seed, "onehot/w3", len(shown), *size.up[1:], first=number)
        w3[shown, :, channel] = 0.0
        w3[role(1, first, n)[0], :, channel] = 1.0
        w3[role(2, first, n)[0], :, channel] = 1.0 / ONE
        return w3

    def down(first: int, n: int) -> F64:
        w2 = np.zeros((n, *size.down[1:]))
        w2[:, np.arange(size.width), pick] = 1.0
        shown, number = role(2, first, n)
        w2[shown] = make.full_bits(seed, "onehot/w2", len(shown), *size.down[1:], first=number)
        return w2

    kind = "float32" if size.dtype == "float32" else "16 bits"
    return size.arrays(
        x,
        size.made(f"onehot/w1/{kind}", size.up, gate),
        size.made("onehot/w3", size.up, up),
        size.made("onehot/w2", size.down, down),
    )


def activation(size: Size) -> Arrays:
    """Gates that run through the values of the dtype, and nothing else that rounds; `dy_RD` is among them.

    Row j of every expert is 1 in channel j, so g[j, f] = w1[f, j] and u[j, f] = w3[f, j]; w2 copies unit f to channel
    f, and dy is 1 there. So y[j, f] = u silu(g), dw1[f, j] = u silu'(g) and dw3[f, j] = silu(g), one term each. u is a
    power of two of either sign, 1 where the product might overflow. The values: every finite one of a 16-bit dtype, in
    an order that the seed chooses; in float32 as many, exponents from -20 to 6, where silu is neither linear nor zero.
    """
    seed, (experts, hidden, width) = size.seed, size.up
    x = np.tile(np.eye(width), (experts, 1))
    count = experts * hidden * width
    storage = make.NUMPY_DTYPES[size.dtype]
    if size.dtype == "float32":
        exponents = make.integers(seed, "activation/exponent", -20, 6, count)
        fraction = 1.0 + make.words(seed, "activation/fraction", count) * 2.0**-32
        sign = 1.0 - 2.0 * make.integers(seed, "activation/sign", 0, 1, count)
        g = make.store(sign * np.ldexp(fraction, exponents.astype(np.int32)), size.dtype)
    else:
        every = np.arange(2**16, dtype=np.uint16).view(storage)
        with np.errstate(invalid="ignore"):  # signalling NaN patterns
            finite = every[np.isfinite(every.astype(np.float64))]
        g = np.resize(finite[make.permutation(seed, "activation/order", len(finite))], count)
    g = g.reshape(size.up)
    u = np.ldexp(1.0 - 2.0 * make.integers(seed, "activation/u", 0, 1, *size.up),
                 make.integers(seed, "activation/power", -3, 7, *size.up).astype(np.int32))  # fmt: skip
    u[np.abs(g.astype(np.float64)) >= 128] = 1.0
    shown = min(hidden, width)
    w2 = np.zeros(size.down, storage)
    w2[:, np.arange(shown), np.arange(shown)] = 1.0
    dy = np.zeros_like(x)
    dy[:, :shown] = 1.0
    return {**size.arrays(x, g, make.store(u, size.dtype), w2), "dy_RD": make.store(dy, size.dtype)}


def backward_integers(size: Size) -> Arrays:
    """Integers whose gradients are exact, too; `dy_RD` is among them.

    x is -1, 0 or 1, rows of w3 have at most seven ones: |u| <= 7, h = 64 u. dy has at most eight values of up to 2 a
    row, w2 at most four of up to 2: |dh| <= 32. So du = 64 dh has 6 significant bits and dg = dh u, at most 224, has 8:
    exact in bfloat16 wherever they are stored. w3 is zero in the gate's channel, where alone w1 is not, so that every
    element of dx comes through one of the two paths. All sums are of integers below 2**24: exact in float32 in any
    order, and rounded once when they are stored.
    """
    seed, channel = size.seed, size.channel("backward")
    x = make.integers(seed, "backward/x", -1, 1, size.rows, size.width).astype(np.float64)
    x[:, channel] = 1.0

    def up(first: int, n: int) -> F64:
        w3 = make.sparse(seed, "backward/w3", 7, 1, n, *size.up[1:], first=first)
        w3[:, :, channel] = 0.0
        return w3

    def down(first: int, n: int) -> F64:
        return make.sparse(seed, "backward/w2", 4, 2, n, *size.down[1:], first=first)

    arrays = size.arrays(
        x, size.gate(channel), size.made("backward/w3", size.up, up), size.made("backward/w2", size.down, down)
    )
    arrays["dy_RD"] = make.store(make.sparse(seed, "backward/dy", 8, 2, size.rows, size.width), size.dtype)
    return arrays


LARGE, LEAST = 2.0**12, 2.0**-9
"""Of `backward_cancelling`: what cancels, in units of what is left; and that unit, so that float16 holds both."""


def backward_cancelling(size: Size) -> Arrays:
    """`backward_integers` whose gradients' partial sums are large and cancel; a part of a sum, stored, loses the rest.

    Over hidden units: the first and the last are equal (w3), and alone reach an output channel b, with weights of L and
    -L. All rows but those below have -1 or 1 in dy there. So dh, du and dg are +-L in the one and -+L in the other, and
    a row of dx is what the other units give: L is lost from it again, 12 bits above.

    Over rows: the first and the last of an expert with three or more are equal, and have L and -L in dy, in one channel
    of the expert's and nowhere else. So they cancel in all three gradients of weights.

    dy is in units of `LEAST`, everything else as in `backward_integers`: dh has at most 6 significant bits, dg 8. The
    largest sum is that of dg in the first unit: below 2**24 units for up to 500 rows. All are exact in float32 in any
    order, wherever their terms are stored in 16 bits; and the first and the last of a sum are in different parts of it,
    wherever it is cut.
    """
    seed, arrays = size.seed, backward_integers(size)
    x, dy = arrays["x_RD"].copy(), arrays["dy_RD"].astype(np.float64)
    w3, w2 = arrays["w3_EFD"].copy(), arrays["w2_EDF"].copy()
    both, *others = (int(at) for at in make.permutation(seed, "backward_cancelling/channels", size.width))
    w3[:, -1] = w3[:, 0]
    w2[:, :, [0, -1]] = w2[:, both, None] = 0
    w2[:, both, 0], w2[:, both, -1] = LARGE, -LARGE
    dy[:, both] = 1.0 - 2.0 * make.integers(seed, "backward_cancelling/signs", 0, 1, size.rows)
    ends = np.cumsum(size.counts_E)
    for e in np.flatnonzero(size.counts_E >= 3):
        first, last = int(ends[e] - size.counts_E[e]), int(ends[e] - 1)
        x[last] = x[first]
        dy[[first, last]] = 0.0
        dy[[first, last], others[e % len(others)]] = LARGE, -LARGE
    return {**arrays, "x_RD": x, "w3_EFD": w3, "w2_EDF": w2, "dy_RD": make.store(dy * LEAST, size.dtype)}


def rounding(size: Size) -> Arrays:
    """What must be rounded, and to which neighbour, whether a stage is stored or kept wider.

    The r-th row of an expert is 1 in the channels 2 r and 2 r + 1, so that a gate and a u are sums of two weights.
    Output channels 2 f and 2 f + 1 show the hidden unit f alone, and hand it a dh of two terms. Gates are from 64 to
    128, where silu is the identity. So y is g u, the gradient of w3 is g dh and that of w1 is u dh. Rows take turns:
      - 0: g is 64; u and dh lie a quarter or three quarters of a unit above a number of the dtype. (u dh is not exact.)
      - 1: the same, but u is a power of two.
      - 2: g, u and dh are any numbers of the dtype, and their products are what must be rounded.
    Each result is the nearest number of the dtype, by one rounding or by two.
    """
    seed, bits = size.seed, SIGNIFICANDS[size.dtype]
    experts, hidden, width = len(size.counts_E), size.hidden, size.width
    shown, most = min(hidden, width // 2), int(size.counts_E.max())
    row_R = np.concatenate([np.arange(n) for n in size.counts_E])
    turn_R, turn = row_R % 3, np.arange(most) % 3

    def number(name: str, *shape: int) -> tuple[F64, F64]:
        """Return a number of the dtype from 1 to 2 with a sign, and a quarter or three quarters of its last place."""
        unit = 2.0 ** (1 - bits) * (1 - 2 * make.integers(seed, f"rounding/{name}/sign", 0, 1, *shape))
        whole = make.integers(seed, f"rounding/{name}/whole", 2 ** (bits - 1), 2**bits - 1, *shape)
        return whole * unit, (2 * make.integers(seed, f"rounding/{name}/part", 0, 1, *shape) + 1) / 4.0 * unit

    x, dy = np.zeros((size.rows, width)), np.zeros((size.rows, width))
    x[np.arange(size.rows), 2 * row_R] = x[np.arange(size.rows), 2 * row_R + 1] = 1.0
    whole, part = number("dh", size.rows, shown)
    dy[:, 0 : 2 * shown : 2], dy[:, 1 : 2 * shown : 2] = whole, np.where(turn_R[:, None] == 2, 0.0, part)
    w1, w3, w2 = np.zeros(size.up), np.zeros(size.up), np.zeros(size.down)
    gates = ONE * np.abs(number("gate", experts, hidden, most)[0])
    w1[:, :, 0 : 2 * most : 2] = np.where(turn == 2, gates, ONE)
    whole, part = number("u", experts, hidden, most)
    w3[:, :, 0 : 2 * most : 2] = np.where(turn == 1, np.sign(whole), whole)
    w3[:, :, 1 : 2 * most : 2] = np.where(turn == 0, part, 0.0)
    w2[:, np.arange(2 * shown), np.arange(2 * shown) // 2] = 1.0
    arrays = size.arrays(x, *(make.store(w, size.dtype) for w in (w1, w3, w2)))
    return {**arrays, "dy_RD": make.store(dy, size.dtype)}


def busiest(counts_E: I64) -> list[tuple[int, int]]:
    """Return (the row in the middle, the expert) of the two experts with the most rows."""
    order = np.argsort(-counts_E, kind="stable")[:2]
    return [(int(counts_E[:e].sum() + counts_E[e] // 2), int(e)) for e in order]


def with_overflowing_gradients(arrays: Arrays, dtype: str, seed: int) -> Arrays:
    """Return `backward_integers` with two rows of a third expert whose gradients overflow, each in every order.

    The expert's u is 1, through the gate's channel c alone, and the four ones of its w2 are in one output channel d.
    In its first two rows dy is V in d alone, x is 1 in c and X in one other channel j. So dh = dg = V and du = 64 V in
    four units, and zero in the others: both are below the dtype's largest, whether they are stored or not. With V the
    largest power of two of which that is true, 128 V overflows. So do, all summands being of one sign, dx in c
    (512 V), dw2 in d (64 V from each row), dw1 and dw3 in j (V X and 64 V X from each); all else is exact as ever.
    """
    w1, w3, w2, x, dy = (arrays[name].copy() for name in ("w1_EFD", "w3_EFD", "w2_EDF", "x_RD", "dy_RD"))
    counts = arrays["counts_E"]
    expert = int(np.argsort(-counts, kind="stable")[2])
    begin = int(counts[:expert].sum())
    c = int(np.flatnonzero(w1[expert, 0])[0])
    d, *others = (int(at) for at in make.permutation(seed, "overflow/channels", x.shape[1])[:3])
    j = next(at for at in others if at != c)
    w3[expert] = w2[expert] = 0
    w3[expert, :, c] = 1
    w2[expert, d, :4] = 1
    rows = slice(begin, begin + 2)
    dy[begin : begin + int(counts[expert]), d] = 0
    x[rows] = dy[rows] = 0
    x[rows, c] = 1
    x[rows, j] = 2.0**10
    dy[rows, d] = 2.0**9 if dtype == "float16" else 2.0**121
    return {**arrays, "w3_EFD": w3, "w2_EDF": w2, "x_RD": x, "dy_RD": dy}


def with_nonfinite_rows(arrays: Arrays, dtype: str) -> Arrays:
    """Return `integers` with a row of NaN, one with an infinity and one that overflows.

    The NaN is in the busiest expert. The other two are in the next one, whose weights are replaced: the gate's channel,
    where x is inf, alone feeds u, too, so that g = u = h = inf, and w2 is the same power of two of one sign for all
    hidden units of an output channel: y is an infinity of that sign in any order, since nothing meets a zero or an
    infinity of the other sign. 2**100 there (128 in float16) gives h = 2**205 (2**19) and a y of more than a quarter
    of it, beyond the dtype, whether the inside of the expert is stored or not. Its other rows have u = 1 and h = 64.
    """
    x, w1 = arrays["x_RD"].copy(), arrays["w1_EFD"]
    w3, w2 = arrays["w3_EFD"].copy(), arrays["w2_EDF"].copy()
    (nan, _), (row, expert) = busiest(arrays["counts_E"])
    channel = int(np.flatnonzero(w1[expert, 0])[0])
    x[nan] = np.nan
    x[row, channel] = np.inf
    x[row + 1, channel] = 128.0 if dtype == "float16" else 2.0**100
    w3[expert] = 0
    w3[expert, :, channel] = 1
    hidden, sign = w2.shape[2], np.where(np.arange(w2.shape[1]) % 2, -1.0, 1.0)
    w2[expert] = make.store(np.ldexp(sign, -int(np.ceil(np.log2(hidden))))[:, None] * np.ones(hidden), dtype)
    return {**arrays, "x_RD": x, "w3_EFD": w3, "w2_EDF": w2}
