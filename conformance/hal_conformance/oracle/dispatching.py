# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine: where rows go, and how they are added up."""

from __future__ import annotations

import numpy as np

from hal_conformance.case import F64, I64
from hal_conformance.numerics.bounds import U32, Bounded
from hal_conformance.numerics.chained import Chained


def sent(experts_TK: I64, num_experts: int, capacity: int | None = None) -> tuple[I64, I64]:
    """Return (slot_R, counts_E): slots by expert, then by slot, at most `capacity` for each."""
    flat = experts_TK.reshape(-1)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=num_experts).astype(np.int64)
    if capacity is not None:
        place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = order[place < capacity]
        counts = np.minimum(counts, capacity)
    return order.astype(np.int64), counts


def spans(counts_E: I64) -> list[tuple[int, slice]]:
    """Return (expert, its rows) for each expert that has rows."""
    ends = np.cumsum(counts_E)
    return [(e, slice(int(end - n), int(end))) for e, (n, end) in enumerate(zip(counts_E, ends, strict=True)) if n]


def gather_rows(y_RD: F64, slot_R: I64, tokens: int, top_k: int) -> F64:
    """Return [T, K, D]: the row that answers each slot, zeros where none does."""
    rows = np.zeros((tokens * top_k, y_RD.shape[1]))
    rows[slot_R] = y_RD
    return rows.reshape(tokens, top_k, y_RD.shape[1])


def gather(y_RD: Chained, slot_R: I64, tokens: int, top_k: int) -> Chained:
    """Return `gather_rows` of a chain."""
    return Chained(*(gather_rows(part, slot_R, tokens, top_k) for part in (y_RD.value, y_RD.var)))


def combine(y_TKD: F64, weights_TK: F64, dtype: str) -> Bounded:
    """Add up weighted rows in float32, in any order, and store.

    K products and K - 1 additions, each rounded once on partial sums that never exceed sum |w y|: K u sum |w y|.
    Each of the 2 K - 1 roundings has at most half an ulp of such a partial sum.
    """
    terms = y_TKD * weights_TK[:, :, None]
    k = terms.shape[1]
    absolute = np.abs(terms).sum(1)
    return Bounded(terms.sum(1), k * U32 * absolute, (2 * k - 1) * (U32 * absolute) ** 2 / 3.0).stored(dtype)


def combine_chained(y_TKD: Chained, weights_TK: F64, dtype: str) -> Chained:
    """Add up weighted rows that have errors, as `combine` does."""
    own = combine(y_TKD.value, weights_TK, "float64")
    return Chained(own.value, own.var + (weights_TK[:, :, None] ** 2 * y_TKD.var).sum(1)).stored(dtype)
