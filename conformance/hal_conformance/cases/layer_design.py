# SPDX-License-Identifier: Apache-2.0
"""Inputs of a layer that is exact forward and backward, the routing's weights being a power of two, w.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices, S shared width.
"""

from __future__ import annotations

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import F64, I64, Array, Arrays, Params
from hal_conformance.cases.base import wide
from hal_conformance.cases.designs import ONE
from hal_conformance.oracle.layer import ROUTED, SHARED

MOST = 255
"""The largest integer that bfloat16 holds together with all smaller ones."""

FEW = 4
"""Channels in which the gradients of every second token lie."""

SCALE = 256.0
"""Of the shared down projection: 64 * 3 * 256 = 49,152 is below float16's largest."""


def integers(arrays: Arrays, top_k: int, p: Params) -> Arrays:
    """Return tokens, weights and upstream gradients in place of those of a layer of the same shapes.

    A token is 1 in the gate's channel c and -1 or 1 in one other. Routed experts: w1 is 64 in c, w3 is 0 there and at
    most m elsewhere, so that |u| <= m and silu is the identity; row d of w2 has a single 1 or -1, so that a row of y is
    64 u, and a token's sum of K of them 64 w times an integer of at most K m. With a shared expert m = 255 // K, and
    that sum is exact wherever it is stored. Without, m = 127: it is rounded once, and 16 bits would lose partial sums.

    Backward, dy has at most n = 255 // m elements of 1 or -1. So sum |dh| <= n w; du = 64 dh and dg = dh u are at most
    64 w and w times n m <= 255; so is a row of dx, through w3 (64 w) or, in c, through w1 (64 w). A token's sum of K of
    those is exact in float32, and rounded once when it is stored. The gate is zero, and adds none. In every second
    token, all of which the hot expert has, dy lies in the same few channels: its dw2 sums many rows of up to 64 w m
    there, and needs more bits than 8.

    The shared expert: w1 as above, u is 1, 2 or 3, and w2 256 or -256 in one place of each row, for half of the
    channels. So y is a multiple of 16,384 there, beside which the routed sum needs rounding in 16 bits, and exact in
    float32. dy is zero in these channels, so that the shared expert adds nothing to dx, while its w2 has a gradient.
    """
    tokens, width = arrays["x_TD"].shape
    experts, hidden, _ = arrays[ROUTED[0]].shape
    order = make.permutation(p.seed, "layer/integers/channels", width)
    channel, half = int(order[0]), order[: width // 2]
    most = MOST // top_k if SHARED[0] in arrays else MOST // 2
    x = np.zeros((tokens, width))
    other = order[make.integers(p.seed, "layer/integers/other", 1, width - 1, tokens)]
    x[np.arange(tokens), other] = 1.0 - 2.0 * make.integers(p.seed, "layer/integers/x", 0, 1, tokens)
    x[:, channel] = 1.0
    dy = make.sparse(p.seed, "layer/integers/dy", MOST // most, 1, tokens, width)
    dy[::2] = 0.0
    dy[::2, order[-FEW:]] = make.sparse(p.seed, "layer/integers/few", MOST // most, 1, len(dy[::2]), FEW)
    if SHARED[0] in arrays:
        dy[:, half] = 0.0

    def gate(*shape: int) -> Array:
        w1 = np.zeros(shape)
        w1[..., channel] = ONE
        return make.store(w1, p.dtype)

    def one_in_each_row(stream: str, *shape: int, first: int = 0) -> F64:
        """Return one element of 1 or -1 in each row, at a place of its own."""
        name = f"layer/integers/{stream}"
        place: I64 = make.integers(p.seed, f"{name}/place", 0, shape[-1] - 1, *shape[:-1], first=first)
        sign = 1.0 - 2.0 * make.integers(p.seed, f"{name}/sign", 0, 1, *shape[:-1], first=first)
        return np.where(place[..., None] == np.arange(shape[-1]), sign[..., None], 0.0)

    def up(first: int, n: int) -> F64:
        w3 = wide(make.integers(p.seed, "layer/integers/w3", -most, most, n, hidden, width, first=first))
        w3[..., channel] = 0.0
        return w3

    def down(first: int, n: int) -> F64:
        return one_in_each_row("w2", n, width, hidden, first=first)

    found = {
        "x_TD": make.store(x, p.dtype),
        "gate_ED": np.zeros_like(arrays["gate_ED"]),
        "dy_TD": make.store(dy, p.dtype),
        "daux": np.zeros_like(arrays["daux"]),
        "dz": np.zeros_like(arrays["dz"]),
        ROUTED[0]: gate(experts, hidden, width),
        ROUTED[1]: make.by_expert((p.seed, "layer/integers/w3", most), p.dtype, (experts, hidden, width), up),
        ROUTED[2]: make.by_expert((p.seed, "layer/integers/w2"), p.dtype, (experts, width, hidden), down),
    }
    if SHARED[0] in arrays:
        w1, w3, w2 = (arrays[name].shape for name in SHARED)
        shared = make.integers(p.seed, "layer/integers/shared_w3", -1, 1, *w3)
        shared[:, channel] = 2
        scaled = SCALE * one_in_each_row("shared_w2", *w2)
        scaled[np.setdiff1d(np.arange(width), half)] = 0.0
        found |= {
            SHARED[0]: gate(*w1), SHARED[1]: make.store(shared, p.dtype), SHARED[2]: make.store(scaled, p.dtype)
        }  # fmt: skip
    return found
