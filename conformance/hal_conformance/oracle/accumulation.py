# SPDX-License-Identifier: Apache-2.0
"""Gradients of micro-batches, weighted by their tokens and added up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hal_conformance.case import F64
from hal_conformance.numerics.bounds import TINY32, U32, Bounded
from hal_conformance.numerics.chained import Chained


def accumulate(parts: Sequence[F64], tokens: Sequence[int]) -> Bounded:
    """Return sum_i (n_i / N) g_i in float32, in any order.

    Each of k terms has a rounded constant and a rounded product, by n_i / N or by n_i and later 1 / N, and there are
    k - 1 sums, none beyond the sum of sizes: (k + 2) u sum_i (n_i / N) |g_i|. Each of the 3 k roundings has at most
    half an ulp of that.
    """
    whole, k = sum(tokens), len(parts)
    terms = [g * (n / whole) for g, n in zip(parts, tokens, strict=True)]
    absolute = np.asarray(sum(np.abs(term) for term in terms))
    bound = (k + 2) * U32 * absolute + k * TINY32 * (absolute > 0)
    return Bounded(np.asarray(sum(terms)), bound, 3 * k * (U32 * absolute) ** 2 / 3.0)


def accumulate_chained(parts: Sequence[Chained], tokens: Sequence[int]) -> Chained:
    """Add up gradients that have errors, as `accumulate` does."""
    own = accumulate([part.value for part in parts], tokens)
    whole = sum(tokens)
    var = sum((n / whole) ** 2 * part.var for part, n in zip(parts, tokens, strict=True))
    return Chained(own.value, np.asarray(own.var + var))
