# SPDX-License-Identifier: Apache-2.0
"""SGD with momentum, one step, over numbers with bounds; see `oracle.adam` for local and chained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hal.moe.optimizer_ops import SGDHyper
from hal_conformance.case import F64
from hal_conformance.numerics.bounds import TINY32, U32, Bounded
from hal_conformance.oracle.adam import gradient


def momentum(b: Bounded, g: F64, p: Bounded, step: int, hyper: SGDHyper) -> Bounded:
    """Return d at the first step or without momentum, else mu b + (1 - dampening) d; d = g + decay p, in float32.

    Each of the two terms has a rounded constant and a rounded product, 2 u of it; the store rounds their sum.
    """
    d = gradient(g, p, hyper.weight_decay)
    if step == 1 or hyper.momentum == 0.0:
        return d.stored("float32") if hyper.weight_decay else d
    kept, added = hyper.momentum * b.value, (1.0 - hyper.dampening) * d.value
    own = 2.0 * U32 * (np.abs(kept) + np.abs(added)) + TINY32
    return Bounded.deterministic(
        kept + added, own + hyper.momentum * b.bound + (1.0 - hyper.dampening) * d.bound
    ).stored("float32")


def parameter(p: Bounded, b: Bounded, hyper: SGDHyper, dtype: str) -> Bounded:
    """Return p - lr b, stored in `dtype`: the constant and the product are rounded, then the sum, then the store."""
    step = hyper.lr * b.value
    value = p.value - step
    bound = p.bound + hyper.lr * b.bound + 2.0 * U32 * np.abs(step) + TINY32
    if dtype != "float32":
        bound = bound + U32 * (np.abs(value) + bound)
    return Bounded.deterministic(value, bound).stored(dtype)


def chained(p: F64, gradients: F64, hypers: Sequence[SGDHyper]) -> tuple[Bounded, Bounded]:
    """Return parameter and momentum after as many steps as there are gradients, in float32."""
    stepped, b = Bounded.exact(p), Bounded.exact(np.zeros_like(p))
    for step, (g, hyper) in enumerate(zip(gradients, hypers, strict=True), 1):
        b = momentum(b, g, stepped, step, hyper)
        stepped = parameter(stepped, b, hyper, "float32")
    return stepped, b
