# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding in the half-split convention; forward and backward are the same equations with sin negated."""

from __future__ import annotations

import numpy as np

from hal_conformance.case import Array
from hal_conformance.numerics.bounds import TINY32, U32, Bounded


def rotary(x_THd: Array, cos_TR: Array, sin_TR: Array) -> Bounded:
    """Return x cos + [-x2, x1] sin for the first R channels, the rest unchanged; not yet stored.

    Two products and a sum in float32: 2 u (|x1 c| + |x2 s|). The table is an input, so the angle has no error. The
    gradient of the input is the rotation back: this function of (dy, cos, -sin).
    """
    x, cos, sin = (np.asarray(array, np.float64) for array in (x_THd, cos_TR, sin_TR))
    rotated = cos.shape[1]
    half = rotated // 2
    turned = np.concatenate((-x[..., half:rotated], x[..., :half]), axis=-1)
    value, bound = x.copy(), np.zeros_like(x)
    straight, across = x[..., :rotated] * cos[:, None], turned * sin[:, None]
    value[..., :rotated] = straight + across
    bound[..., :rotated] = 2.0 * U32 * (np.abs(straight) + np.abs(across)) + TINY32
    return Bounded.deterministic(value, bound)
