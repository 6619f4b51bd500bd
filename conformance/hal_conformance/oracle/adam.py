# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW, one step, over numbers with bounds.

From what the device itself returned from the step before, the error is local; from the oracle's own results it is
chained. Bounds are absolute: with ten steps of a few roundings each they are tighter than lambda deviations, since
lambda sqrt(n / 3) > n for n < 21.

Implementations differ in one more thing: where 1 - beta and the bias corrections are computed. In float32, beta
itself is rounded, and 1 - beta carries the error u beta / (1 - beta), 1000 u for beta2 = 0.999. Both readings are
honest (torch's loops compute in float64, its CUDA kernel and Apex in float32), for each constant by itself, so each
combination is judged by itself: one bound for all would be loose by that factor.

Legend: u unit roundoff of float32, t the step, g gradient, m and v the moments, p the parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hal.moe.optimizer_ops import AdamHyper
from hal_conformance.case import F64
from hal_conformance.numerics.bounds import TINY32, U32, Bounded


@dataclass(frozen=True)
class Reading:
    """Where an implementation computes 1 - beta: each constant by itself, so that one may be single and another not.

    Attributes:
        single_first, single_second: that moment's beta is rounded to float32 before 1 - beta is formed.
        single_corrections: 1 - beta^t is formed in float32.
    """

    single_first: bool
    single_second: bool
    single_corrections: bool

    def betas(self, hyper: AdamHyper) -> tuple[float, float]:
        """Return the decay rates of the moments."""
        first = float(np.float32(hyper.beta1)) if self.single_first else hyper.beta1
        second = float(np.float32(hyper.beta2)) if self.single_second else hyper.beta2
        return first, second


READINGS = tuple(Reading(*single) for single in itertools.product((False, True), repeat=3))


class AdamOracle(NamedTuple):
    """The results of one step, stored."""

    parameter: Bounded
    first: Bounded
    second: Bounded


def gradient(g: F64, p: Bounded, decay: float) -> Bounded:
    """Return g + decay p: the constant, the product and the sum are rounded."""
    if decay == 0.0:
        return Bounded.exact(g)
    term = decay * p.value
    value = g + term
    return Bounded.deterministic(value, decay * p.bound + U32 * (np.abs(value) + 2.0 * np.abs(term)) + TINY32)


def first_moment(m: Bounded, g: Bounded, beta: float) -> Bounded:
    """Return beta m + w g, w = 1 - beta, stored in float32.

    As a sum of two products: both constants and both products are rounded, 2 u (beta |m| + w |g|). As m + w (g - m):
    the difference, the constant and the product, 3 u w |g - m|. The store rounds the sum; `TINY32` admits flushing.
    """
    w = 1.0 - beta
    value = beta * m.value + w * g.value
    products = 2.0 * (beta * np.abs(m.value) + w * np.abs(g.value))
    own = U32 * np.maximum(products, 3.0 * w * np.abs(g.value - m.value)) + TINY32
    return Bounded.deterministic(value, own + beta * m.bound + w * g.bound).stored("float32")


def second_moment(v: Bounded, g: Bounded, beta: float) -> Bounded:
    """Return beta v + w g^2, w = 1 - beta, stored in float32.

    As a sum: 2 u beta v for the constant and the product, 3 u w g^2 for the square, the constant and the product. As
    v + w (g^2 - v): w u g^2 for the square and 3 u w |g^2 - v|.
    """
    w, square = 1.0 - beta, g.value**2
    value = beta * v.value + w * square
    products = 2.0 * beta * np.abs(v.value) + 3.0 * w * square
    own = U32 * np.maximum(products, w * (square + 3.0 * np.abs(square - v.value))) + TINY32
    inherited = beta * v.bound + w * (2.0 * np.abs(g.value) * g.bound + g.bound**2)
    return Bounded.deterministic(value, own + inherited).stored("float32")


Steps = int | F64
"""A step, or one for each row of what is judged at once."""


def correction(beta: float, step: Steps, single: bool) -> tuple[F64, F64]:
    """Return 1 - beta^t and the relative error of forming it in float32.

    beta is rounded, t u of beta^t; pow has at most 2 ulp, 4 u of beta^t; the difference takes both over, divided by
    itself. In float64 nothing is left but the rounding of the constant, which `parameter` counts.
    """
    power = np.asarray(beta**step)
    error = (step + 4) * U32 * power / (1.0 - power)
    return 1.0 - power, error if single else np.zeros_like(error)


def parameter(
    p: Bounded, m: Bounded, v: Bounded, step: Steps, hyper: AdamHyper, dtype: str, *, decoupled: bool, single: bool
) -> Bounded:
    """Return (1 - lr decay) p - lr / c1 m / (sqrt(v / c2) + epsilon), stored in `dtype`.

    The quotient lies between (|m| - B_m) / (largest denominator) and (|m| + B_m) / (smallest), which stays right where
    |m| < B_m leaves even the sign open, and where v is below its own bound and epsilon decides. The second end is the
    farther one. Roundings of the quotient, in the longest of the forms in use (Apex): lr / c1 and v / c2 each a
    constant and a quotient, the latter halved by the root, the root, the sum, the quotient, and the product with lr, a
    constant too: 2 + 1 + 1 + 1 + 1 + 2 = 8 u.

    Decay, by a rounded constant: 2 u |(1 - lr decay) p|. By p - lr decay p: two constants and two products, 4 u lr
    decay |p|, and the difference, u. Inside the update (Apex): 5 u lr decay |p|, and a sum with the update, u.

    The last sum is rounded to float32, and then to `dtype`. `TINY32` admits moments that are taken for zero where they
    are subnormal.
    """
    c1, e1 = correction(hyper.beta1, step, single)
    c2, e2 = correction(hyper.beta2, step, single)
    size, m_bound = np.abs(m.value), m.bound + TINY32
    denominator = np.sqrt(v.value / c2) + hyper.epsilon
    # A device's own second moment may be infinite where its first is not: then so is the least denominator.
    lowest = np.where(np.isinf(v.value), v.value, v.value - v.bound - TINY32)
    least = np.sqrt(np.maximum(lowest, 0.0) / (c2 * (1.0 + e2))) + hyper.epsilon
    step_size = hyper.lr / c1
    update = step_size * m.value / denominator
    farthest = step_size * (1.0 + e1) * (size + m_bound) / least * (1.0 + 8.0 * U32)
    bound = farthest - step_size * size / denominator
    value = p.value
    if decoupled and hyper.weight_decay:
        lost = hyper.lr * hyper.weight_decay * np.abs(p.value)
        value = (1.0 - hyper.lr * hyper.weight_decay) * p.value
        kept = np.abs(value)
        bound = bound + U32 * np.maximum(np.maximum(2.0 * kept, kept + 4.0 * lost), 5.0 * lost + np.abs(update))
    value = value - update
    bound = bound + p.bound + TINY32
    if dtype != "float32":
        bound = bound + U32 * (np.abs(value) + bound)
    return Bounded.deterministic(value, bound).stored(dtype)


def unstored(stored: F64) -> Bounded:
    """Return a float32 result that the next operation may have taken before it was rounded."""
    return Bounded.deterministic(stored, U32 * np.abs(stored))


def chained(p: F64, gradients: F64, hypers: Sequence[AdamHyper], reading: Reading, *, decoupled: bool) -> AdamOracle:
    """Return the results of as many steps as there are gradients, from zero moments, in float32."""
    parameter_, m, v = (Bounded.exact(a) for a in (p, np.zeros_like(p), np.zeros_like(p)))
    for step, (g, hyper) in enumerate(zip(gradients, hypers, strict=True), 1):
        beta1, beta2 = reading.betas(hyper)
        effective = gradient(g, parameter_, 0.0 if decoupled else hyper.weight_decay)
        m, v = first_moment(m, effective, beta1), second_moment(v, effective, beta2)
        parameter_ = parameter(
            parameter_, m, v, step, hyper, "float32", decoupled=decoupled, single=reading.single_corrections
        )
    return AdamOracle(parameter_, m, v)
