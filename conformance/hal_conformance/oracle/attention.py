# SPDX-License-Identifier: Apache-2.0
"""Attention, one head after the other: the variances of what happens between q, k, v and the result.

Nothing inside can be seen, so variances are chained, by the equations of FlashAttention. Relative errors of one
probability p_j move the result by p_j (v_j - y), since the probabilities add up to 1: an error that a whole row shares
cancels. Errors of a row's normaliser do not, and those of stored probabilities act on v_j alone.

Legend: T queries, S keys, d width of a head, e width of a value, l logits, p probabilities, u unit roundoff.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.bounds import EXP, SIGNIFICANDS, TINY32, U32, half_ulp, matmul_variance
from hal_conformance.case import F64, Array
from hal_conformance.chained import Chained, product

CONSTANTS = 1.25 * U32
"""Relative error of the logits' factor scale log2(e): u of the product, and a quarter of u of log2(e) in float32."""


@dataclass(frozen=True)
class Head:
    """One head's probabilities with their errors, and its result before it is stored.

    Attributes:
        p: probabilities [T, S], 0 where hidden.
        own: variance of each one's relative error, independent for each; [T, S].
        shared: size of the relative error that grows with the distance from the largest logit, of one sign; [T, S].
        row: variance of the relative error that a row's probabilities share, when they are computed anew; [T, 1].
        stored: variance of rounding a probability to `dtype`; [T, S], 0 where hidden.
        seen: how many keys each query sees; [T, 1].
        y: the result.
    """

    q: Chained
    k: Chained
    v: Chained
    scale: float
    p: F64
    own: F64
    shared: F64
    row: F64
    stored: F64
    seen: F64
    y: Chained
    dtype: str
    rule: Arithmetic

    @classmethod
    def of(cls, q: Chained, k: Chained, v: Chained, scale: float, hidden: Array, dtype: str, rule: Arithmetic) -> Head:
        """Compute one head; `hidden` [T, S] tells which keys a query does not see.

        l = scale q k^T: `product`, and the roundings of scaling. exp(l - max): 2 ulp, u d for rounding the difference
        d, another for kernels that work in base 2, u |l| for those that scale before they subtract. The sum of n
        probabilities: n u^2/3, 4 u for the division or the log, and stagnation. The product with v: `matmul_variance`
        over the keys that are seen.
        """
        logits = product(q, k.T, rule)
        value = scale * logits.value
        var_logits = scale**2 * logits.var
        top = np.where(hidden, -np.inf, value).max(1, keepdims=True, initial=-np.inf)
        distance = np.where(hidden, 0.0, top - value)
        e = np.where(hidden, 0.0, np.exp(-distance))
        total = e.sum(1, keepdims=True)
        p = e / total
        seen = (~hidden).sum(1, keepdims=True).astype(np.float64)
        own = var_logits + (EXP + U32 * (2.0 * distance + 2.0 * np.abs(value))) ** 2 / 3.0
        shared = CONSTANTS * distance
        stagnation = np.where(p < 8.0 * U32, np.minimum(p, U32), 0.0).sum(1, keepdims=True)
        normaliser = (seen * U32**2 + (4.0 * U32) ** 2) / 3.0 + stagnation**2
        log = np.abs(np.log(total))
        row = normaliser + (U32 * (np.abs(top + log) + np.abs(top) + 4.0 * log)) ** 2 / 3.0
        # Not normalised, a probability may lie anywhere in its binade; below the normal numbers the error is absolute.
        rough = np.maximum(p * 2.0 ** -SIGNIFICANDS[dtype], _least(dtype)) ** 2 / 3.0
        stored = np.where(hidden, 0.0, rough)
        y = p @ v.value
        squares, p2 = (p * p) @ v.value**2, p * p
        weights = p2 * own
        moved = weights @ v.value**2 - 2.0 * y * (weights @ v.value) + y**2 * weights.sum(1, keepdims=True)
        spread = np.maximum(p @ v.value**2 - y**2, 0.0)
        var = (
            np.maximum(moved, 0.0)
            + (p * shared**2).sum(1, keepdims=True) * spread  # Cauchy-Schwarz over what is of one sign
            + stored @ v.value**2
            + normaliser * y**2
            + _matmul(y, squares, seen, rule)
        )
        if v.var.any():
            var = var + p2 @ v.var
        return cls(q, k, v, scale, p, own, shared, row, stored, seen, Chained(y, var), dtype, rule)

    def backward(self, dy: F64) -> tuple[Chained, Chained, Chained]:
        """Return the gradients of q, k and v, not stored; q, k and v are exact.

        dP = dy v^T; D = sum_e dy y, from the stored y, or sum_j p dP; dS = p (dP - D), stored; dq = scale dS k,
        dk = scale dS^T q, dv = P^T dy. An error of D or of the normaliser is one for a row: in dq it meets sum_j p k.
        The errors of logits reach dS itself and, through y, D: `together`.
        """
        q, k, v, p, rule = self.q.value, self.k.value, self.v.value, self.p, self.rule
        dp = dy @ v.T
        var_dp = matmul_variance(dp, (dy**2) @ (v.T**2), dy.shape[1], rule)
        half = half_ulp(np.abs(self.y.value) + 4.0 * np.sqrt(self.y.var), self.dtype)
        dot = (dy * self.y.value).sum(1, keepdims=True)
        var_dot = (
            (dy**2 * (2.0 * self.y.var + half**2 / 3.0)).sum(1, keepdims=True)
            + matmul_variance(dot, ((dy * self.y.value) ** 2).sum(1, keepdims=True), dy.shape[1], Arithmetic())
            + (p**2 * (var_dp + dp**2 * U32**2)).sum(1, keepdims=True)
            + _matmul(dot, ((p * dp) ** 2).sum(1, keepdims=True), self.seen, Arithmetic())
        )
        slope = dp - dot
        ds, p2 = p * slope, p**2
        least = _least(self.dtype) * max(1.0, 1.0 / self.scale)
        rough = np.maximum(np.abs(ds) * 2.0 ** -SIGNIFICANDS[self.dtype], least) ** 2 / 3.0
        visible = self.stored > 0.0
        own = p2 * (2.0 * slope**2 * self.own + var_dp + 4.0 * U32**2 * (dp**2 + dot**2)) + visible * rough
        one_sign = np.abs(ds) * self.shared
        by_row = ds**2 * self.row + p2 * var_dot
        dq, dk, dv = ds @ k, ds.T @ q, p.T @ dy
        seen_by = visible.sum(0)[:, None].astype(np.float64)
        var_dq = (
            own @ k**2 + (one_sign @ np.abs(k)) ** 2 + dq**2 * (self.row + U32**2) + (p @ k) ** 2 * var_dot
            + _matmul(dq, ds**2 @ k**2, self.seen, rule)
        )  # fmt: skip
        var_dk = (
            (own + by_row).T @ q**2 + (one_sign.T @ np.abs(q)) ** 2 + dk**2 * U32**2
            + _matmul(dk, (ds**2).T @ q**2, seen_by, rule)
        )  # fmt: skip
        through_sum = (p2 * self.own).sum(1, keepdims=True)
        own_p = p2 * (2.0 * self.own + self.row + 2.0 * through_sum) + self.stored
        var_dv = own_p.T @ dy**2 + ((p * self.shared).T @ np.abs(dy)) ** 2 + _matmul(dv, p2.T @ dy**2, seen_by, rule)
        return Chained(self.scale * dq, self.scale**2 * var_dq), Chained(self.scale * dk, self.scale**2 * var_dk), \
            Chained(dv, var_dv)  # fmt: skip


def _least(dtype: str) -> float:
    """Return the absolute error of a stored number: below the normal ones it is rounded to the smallest, and a float32
    of that size, such as exp gives, may be flushed to zero."""
    return max(float(half_ulp(np.zeros(1), dtype)[0]), TINY32)


def _matmul(value: F64, squares: F64, inner: F64, rule: Arithmetic) -> F64:
    """Return `matmul_variance` where each row has another inner length: what is hidden adds exact zeros."""
    return matmul_variance(value, squares, inner, rule)  # type: ignore[arg-type]  # broadcasts


def hidden_keys(queries: int, keys: int, causal: bool) -> Array:
    """Return [T, S], true where a query does not see a key; the queries are the last positions."""
    if not causal:
        return np.zeros((queries, keys), bool)
    return np.arange(keys)[None] > np.arange(queries)[:, None] + (keys - queries)


def heads(
    q_THd: Array, k_SGd: Array, v_SGe: Array, scale: float, causal: bool, dtype: str, rule: Arithmetic
) -> Iterator[tuple[int, int, Head]]:
    """Yield (query head, its key head, its inside)."""
    share = q_THd.shape[1] // k_SGd.shape[1]
    hidden = hidden_keys(len(q_THd), len(k_SGd), causal)
    for h in range(q_THd.shape[1]):
        g = h // share
        q, k, v = Chained.exact(q_THd[:, h]), Chained.exact(k_SGd[:, g]), Chained.exact(v_SGe[:, g])
        yield h, g, Head.of(q, k, v, scale, hidden, dtype, rule)


def attention(
    q_THd: Array, k_SGd: Array, v_SGe: Array, scale: float, causal: bool, dtype: str, rule: Arithmetic
) -> Chained:
    """Return the result [T, H, e], stored."""
    every = [inside.y for _, _, inside in heads(q_THd, k_SGd, v_SGe, scale, causal, dtype, rule)]
    return _stack(every).stored(dtype)


@dataclass(frozen=True)
class Gradients:
    """Result and gradients of attention, stored."""

    y: Chained
    dq: Chained
    dk: Chained
    dv: Chained


def attention_backward(
    q_THd: Array, k_SGd: Array, v_SGe: Array, dy_THe: Array, scale: float, causal: bool, dtype: str, rule: Arithmetic
) -> Gradients:
    """Return the result and the gradients; those of k and v add up over the query heads that share a key head, and
    may be stored for each before that."""
    y, dq = [], []
    dk, dv = (Chained(np.zeros(array.shape), np.zeros(array.shape)) for array in (k_SGd, v_SGe))
    grouped = q_THd.shape[1] != k_SGd.shape[1]
    for h, g, inside in heads(q_THd, k_SGd, v_SGe, scale, causal, dtype, rule):
        of_q, of_k, of_v = inside.backward(np.asarray(dy_THe[:, h], np.float64))
        y.append(inside.y)
        dq.append(of_q)
        dk[:, g] = dk[:, g] + (of_k.stored(dtype) if grouped else of_k)
        dv[:, g] = dv[:, g] + (of_v.stored(dtype) if grouped else of_v)
    return Gradients(_stack(y).stored(dtype), _stack(dq).stored(dtype), dk.stored(dtype), dv.stored(dtype))


def latent_attention(
    q_THd: Array,
    q_THR: Array,
    latent_SL: Array,
    k_SR: Array,
    up_k_HdL: Array,
    up_v_HeL: Array,
    scale: float,
    causal: bool,
    dtype: str,
    rule: Arithmetic,
) -> Chained:
    """Return multi-head latent attention [T, H, e], stored.

    Either order of the projections is admitted, and the variances of both are added: the keys and values projected up
    and stored; or q projected down and stored, and the sum of latents stored before it is projected up.
    """
    hidden = hidden_keys(len(q_THd), len(latent_SL), causal)
    latent = Chained.exact(latent_SL)
    every = []
    for h in range(q_THd.shape[1]):
        up_k, up_v = Chained.exact(up_k_HdL[h]), Chained.exact(up_v_HeL[h])
        k = product(latent, up_k.T, rule).stored(dtype)
        v = product(latent, up_v.T, rule).stored(dtype)
        absorbed = product(Chained.exact(q_THd[:, h]), up_k, rule).stored(dtype)
        rotated = np.asarray(k_SR, np.float64)
        keys = Chained(np.concatenate((k.value, rotated), 1), np.concatenate((k.var, np.zeros(rotated.shape)), 1))
        queries = Chained.exact(np.concatenate((q_THd[:, h], q_THR[:, h]), 1))
        inside = Head.of(queries, keys, v, scale, hidden, dtype, rule)
        # The other order, as if it were a second error of the logits and of the result.
        logits = scale**2 * (absorbed.var @ latent.value.T**2)
        weights = inside.p**2 * logits
        summed = inside.p @ latent.value
        half = half_ulp(np.abs(summed), dtype)
        of_sum = half**2 / 3.0 + _matmul(summed, inside.p**2 @ latent.value**2, inside.seen, rule)
        centre = v.value[None] - inside.y.value[:, None]  # [T, S, e]
        var = inside.y.var + np.einsum("ts,tse->te", weights, centre**2) + of_sum @ up_v.value.T**2
        every.append(Chained(inside.y.value, var))
    return _stack(every).stored(dtype)


def _stack(parts: list[Chained]) -> Chained:
    """Put heads side by side on the second axis."""
    return Chained(np.stack([part.value for part in parts], 1), np.stack([part.var for part in parts], 1))
