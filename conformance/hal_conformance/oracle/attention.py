# SPDX-License-Identifier: Apache-2.0
"""Attention, one head after the other: the variances of what happens between q, k, v and the result.

Nothing inside can be seen, so variances are chained, by the equations of FlashAttention. Relative errors of one
probability p_j move the result by p_j (v_j - y), since the probabilities add up to 1: an error that a whole row shares
cancels. Errors of a row's normaliser do not, and those of stored probabilities act on v_j alone.

Legend: T queries, S keys, d width of a head, e width of a value, l logits, p probabilities, u unit roundoff.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.case import F64, Array
from hal_conformance.numerics.bounds import EXP, SIGNIFICANDS, TINY32, U32, flushed, half_ulp, matmul_variance
from hal_conformance.numerics.chained import Chained, product

CONSTANTS = 1.25 * U32
"""Relative error of the logits' factor scale log2(e): u of the product, and a quarter of u of log2(e) in float32."""


@dataclass(frozen=True)
class Head:
    """One head's probabilities with their errors, and its result before it is stored.

    Attributes:
        p: probabilities [T, S], 0 where hidden.
        own: variance of each one's relative error, independent for each; [T, S].
        shared: size of the relative error that grows with the distance from the largest logit, of one sign; [T, S].
        row: variance of the relative error that a row's probabilities share, when their sum is known by its logarithm:
            in the backward pass, and where parts of the keys are put together; [T, 1].
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
        probabilities: n u^2/3, 4 u for the division or the log, and stagnation. Parts of the keys may be normalised
        by themselves and put together by their log-sum-exp: an error of one is shared by its keys, and parts of keys
        that come in no order add up as single ones do, so it counts for each. The product with v: `matmul_variance`
        over the keys that are seen, and `flushed`: a probability is no larger while it is not normalised yet.
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
        shared = CONSTANTS * distance
        stagnation = np.where(p < 8.0 * U32, np.minimum(p, U32), 0.0).sum(1, keepdims=True)
        normaliser = (seen * U32**2 + (4.0 * U32) ** 2) / 3.0 + stagnation**2
        log = np.abs(np.log(total))
        row = normaliser + (U32 * (np.abs(top + log) + np.abs(top) + 4.0 * log)) ** 2 / 3.0
        own = var_logits + (EXP + U32 * (2.0 * distance + 2.0 * np.abs(value))) ** 2 / 3.0 + row
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
            + row * y**2  # exp(l_part - l) of parts' log-sum-exp need not add up to 1
            + _matmul(y, squares, seen, rule)
        )
        if v.var.any():
            var = var + p2 @ v.var
        lost = flushed(p, v.value, rule, 4.0 * p * np.sqrt(own), 4.0 * np.sqrt(v.var))
        var = _and_lost(var, lost)
        return cls(q, k, v, scale, p, own, shared, row, stored, seen, Chained(y, var), dtype, rule)

    def backward(self, dy: F64) -> tuple[Chained, Chained, Chained]:
        """Return the gradients of q, k and v, not stored; q, k and v are exact."""
        slopes = self.slopes(dy)
        return slopes.dq(self.k.value), slopes.dk(self.q.value), slopes.dv(dy)

    def slopes(self, dy: F64) -> Slopes:
        """Return dS and its errors; q, k and v are exact.

        dP = dy v^T; D = sum_e dy y, from the stored y, or sum_j p dP; dS = p (dP - D), stored. Probabilities are
        computed anew, in another order than in the forward pass perhaps: of a sum over them, theirs are the errors, and
        that of the normaliser moves it by itself, since they need not add up to 1 then.
        """
        v, p, rule = self.v.value, self.p, self.rule
        dp = dy @ v.T
        var_dp = matmul_variance(dp, (dy**2) @ (v.T**2), dy.shape[1], rule)
        lost_dp = flushed(dy, v.T, rule)
        lost_dp = np.zeros_like(dp) if lost_dp is None else lost_dp
        half = half_ulp(np.abs(self.y.value) + 4.0 * np.sqrt(self.y.var), self.dtype)
        dot = (dy * self.y.value).sum(1, keepdims=True)
        of_sum = (
            matmul_variance(dot, ((dy * self.y.value) ** 2).sum(1, keepdims=True), dy.shape[1], Arithmetic())
            + (p**2 * (var_dp + dp**2 * (U32**2 + self.own))).sum(1, keepdims=True)
            + (p * (self.shared * np.abs(dp) + lost_dp)).sum(1, keepdims=True) ** 2
            + self.row * dot**2
            + _matmul(dot, ((p * dp) ** 2).sum(1, keepdims=True), self.seen, Arithmetic())
        )
        var_dot = (dy**2 * (2.0 * self.y.var + half**2 / 3.0)).sum(1, keepdims=True) + of_sum
        slope = dp - dot
        ds, p2 = p * slope, p**2
        least = _least(self.dtype) * max(1.0, 1.0 / self.scale)
        rough = np.maximum(np.abs(ds) * 2.0 ** -SIGNIFICANDS[self.dtype], least) ** 2 / 3.0
        visible = self.stored > 0.0
        # What truncation loses of the products dP is of one sign.
        cut = rule.rounding == "truncate"
        of_dp, lost = (np.zeros_like(var_dp), var_dp) if cut else (var_dp, np.zeros_like(var_dp))
        own = p2 * (2.0 * slope**2 * self.own + of_dp + 4.0 * U32**2 * (dp**2 + dot**2))
        # Where the largest logit is subtracted and trained through, its key gets what a row's dS do not sum to 0.
        largest = np.arange(p.shape[1]) == (p.argmax(1) if p.size else np.zeros(len(p)))[:, None]
        own = own + largest * (own.sum(1, keepdims=True) + of_sum) + visible * rough
        one_sign = np.sqrt((ds * self.shared) ** 2 + p2 * (lost + lost_dp**2))
        seen_by = visible.sum(0)[:, None].astype(np.float64)
        return Slopes(self, ds, own, one_sign, ds**2 * self.row + p2 * var_dot, var_dot, seen_by)


@dataclass(frozen=True)
class Slopes:
    """dS of one head with its errors, and what it is multiplied with.

    An error of D or of the normaliser is one for a row: in dq it meets sum_j p k. The errors of logits reach dS itself
    and, through y, D: `together`.

    Attributes:
        ds: [T, S].
        own: variance of each one's error, independent for each.
        one_sign: size of the error of one sign.
        by_row: variance of the error that a row shares.
        var_dot: variance of D; [T, 1].
        seen_by: how many queries see each key; [S, 1].
    """

    head: Head
    ds: F64
    own: F64
    one_sign: F64
    by_row: F64
    var_dot: F64
    seen_by: F64

    def dq(self, k: F64) -> Chained:
        """Return scale dS k, not stored, for exact keys or what keys are made of."""
        head, dq = self.head, self.ds @ k
        small = min(1.0, head.scale)  # of which dS may be stored with its scale
        lost = flushed(self.ds * small, k, head.rule, 4.0 * small * np.sqrt(self.own))
        var = (
            self.own @ k**2 + (self.one_sign @ np.abs(k)) ** 2 + dq**2 * (head.row + U32**2)
            + (head.p @ k) ** 2 * self.var_dot + _matmul(dq, self.ds**2 @ k**2, head.seen, head.rule)
        )  # fmt: skip
        return Chained(head.scale * dq, head.scale**2 * _and_lost(var, lost, small))

    def dk(self, q: F64) -> Chained:
        """Return scale dS^T q, not stored."""
        head, dk = self.head, self.ds.T @ q
        small = min(1.0, head.scale)
        lost = flushed(self.ds.T * small, q, head.rule, 4.0 * small * np.sqrt(self.own.T))
        var = (
            (self.own + self.by_row).T @ q**2 + (self.one_sign.T @ np.abs(q)) ** 2 + dk**2 * U32**2
            + _matmul(dk, (self.ds**2).T @ q**2, self.seen_by, head.rule)
        )  # fmt: skip
        return Chained(head.scale * dk, head.scale**2 * _and_lost(var, lost, small))

    def dv(self, dy: F64) -> Chained:
        """Return P^T dy, not stored."""
        head = self.head
        p, p2, dv = head.p, head.p**2, head.p.T @ dy
        through_sum = (p2 * head.own).sum(1, keepdims=True)
        own_p = p2 * (2.0 * head.own + head.row + 2.0 * through_sum) + head.stored
        var = own_p.T @ dy**2 + ((p * head.shared).T @ np.abs(dy)) ** 2
        lost = flushed(p.T, dy, head.rule, 4.0 * (p * np.sqrt(head.own)).T)
        return Chained(dv, _and_lost(var + _matmul(dv, p2.T @ dy**2, self.seen_by, head.rule), lost))


def _and_lost(var: F64, lost: F64 | None, small: float = 1.0) -> F64:
    """Return a variance with what a product of operands that were `small` times as large may lose of them."""
    return var if lost is None else 2.0 * (var + (lost / small) ** 2)


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
    """Return the result [T, H, e], not stored."""
    return _stack([inside.y for _, _, inside in heads(q_THd, k_SGd, v_SGe, scale, causal, dtype, rule)])


@dataclass(frozen=True)
class Gradients:
    """Result and gradients of attention, not stored."""

    y: Chained
    dq: Chained
    dk: Chained
    dv: Chained


def attention_backward(
    q_THd: Array, k_SGd: Array, v_SGe: Array, dy_THe: Array, scale: float, causal: bool, dtype: str, rule: Arithmetic
) -> Gradients:
    """Return the result and the gradients, not stored; those of k and v add up over the query heads that share a key
    head, and may be stored for each before that."""
    y, dq = [], []
    dk, dv = (Chained(np.zeros(array.shape), np.zeros(array.shape)) for array in (k_SGd, v_SGe))
    grouped = q_THd.shape[1] != k_SGd.shape[1]
    for h, g, inside in heads(q_THd, k_SGd, v_SGe, scale, causal, dtype, rule):
        of_q, of_k, of_v = inside.backward(np.asarray(dy_THe[:, h], np.float64))
        y.append(inside.y)
        dq.append(of_q)
        dk[:, g] = dk[:, g] + (of_k.stored(dtype) if grouped else of_k)
        dv[:, g] = dv[:, g] + (of_v.stored(dtype) if grouped else of_v)
    return Gradients(_stack(y), _stack(dq), dk, dv)


LATENT = ("q_THd", "q_THR", "latent_SL", "k_SR", "up_k_HdL", "up_v_HeL")
"""The arguments of latent attention that have gradients."""


def latent_attention(given: Mapping[str, Array], scale: float, causal: bool, dtype: str, rule: Arithmetic) -> Chained:
    """Return multi-head latent attention [T, H, e] of `LATENT`, not stored.

    Either order of the projections is admitted, and the variances of both are added: the keys and values projected up
    and stored; or q projected down and stored, and the sum of latents stored before it is projected up.
    """
    q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL = (given[name] for name in LATENT)
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
    return _stack(every)


def latent_backward(
    given: Mapping[str, Array], dy_THe: Array, scale: float, causal: bool, dtype: str, rule: Arithmetic
) -> dict[str, Chained]:
    """Return the gradients of `LATENT`, not stored, where both orders of the projections round none of their products.

    So keys and values, q up_k and dy up_v are exact in `dtype`; what is left are the errors of attention, and those of

        dup_k = scale q^T (dS C) = dk^T C,    dup_v = dy^T (P C) = dv^T C,    dC = scale dS^T (q up_k) + P^T (dy up_v),

    C the latent: in either order the inner factor may be stored, and the variances of both are added. The errors of dS
    are independent for each query, so those of dS C are, too, and they add up over queries as `product` says. dC and
    the gradient of the rotated keys add up over heads, and may be stored for each before that.
    """
    q, q_r, latent, k_r, up_k, up_v = (np.asarray(given[name], np.float64) for name in LATENT)
    dy = np.asarray(dy_THe, np.float64)
    hidden, width = hidden_keys(len(q), len(latent), causal), q.shape[2]
    made: dict[str, list[Chained]] = {name: [] for name in LATENT}
    dlatent, dk_r = (Chained(np.zeros(array.shape), np.zeros(array.shape)) for array in (latent, k_r))
    exact = Chained.exact
    for h in range(q.shape[1]):
        keys, values = np.concatenate((latent @ up_k[h].T, k_r), 1), latent @ up_v[h].T
        queries = np.concatenate((q[:, h], q_r[:, h]), 1)
        inside = Head.of(exact(queries), exact(keys), exact(values), scale, hidden, dtype, rule)
        summed = Head.of(exact(queries), exact(keys), exact(latent), scale, hidden, dtype, rule).y
        # For the gradients the probabilities are computed anew.
        summed = Chained(summed.value, summed.var + inside.row * summed.value**2).stored(dtype)
        otherwise = product(_rounding(summed, dtype), exact(up_v[h].T), rule)
        inside = replace(inside, y=Chained(inside.y.value, inside.y.var + otherwise.var))
        slopes = inside.slopes(dy[:, h])
        dq, dk, dv = slopes.dq(keys), slopes.dk(queries), slopes.dv(dy[:, h])
        down = slopes.dq(latent)
        through_latent = product(_rounding(down, dtype), exact(up_k[h].T), rule)
        made["q_THd"].append(Chained(dq.value[:, :width], dq.var[:, :width] + through_latent.var))
        made["q_THR"].append(dq[:, width:])
        dk_r = dk_r + dk[:, width:].stored(dtype)
        for name, of_queries, factor, of_keys in (
            ("up_k_HdL", q[:, h], down, dk[:, :width]),
            ("up_v_HeL", dy[:, h], summed, dv),
        ):
            first = product(exact(of_queries.T), factor.stored(dtype), rule)
            second = product(_rounding(of_keys, dtype).T, exact(latent), rule)
            made[name].append(Chained(first.value, first.var + second.var))
        for of_keys, up, inner, whole in (
            (dk[:, :width], up_k[h], q[:, h], slopes.dk), (dv, up_v[h], dy[:, h], slopes.dv),
        ):  # fmt: skip
            part = whole(inner @ up)
            other = product(_rounding(of_keys, dtype), exact(up), rule)
            dlatent = dlatent + Chained(part.value, part.var + other.var).stored(dtype)
    side = {name: _stack(made[name]) for name in ("q_THd", "q_THR")}
    up = {
        name: Chained(np.stack([part.value for part in made[name]]), np.stack([part.var for part in made[name]]))
        for name in ("up_k_HdL", "up_v_HeL")
    }
    return {**side, **up, "latent_SL": dlatent, "k_SR": dk_r}


def _rounding(a: Chained, dtype: str) -> Chained:
    """Return a value with the variance of storing it alone: its own errors are counted elsewhere."""
    return Chained(a.value, half_ulp(np.abs(a.value) + 4.0 * np.sqrt(a.var), dtype) ** 2 / 3.0)


def _stack(parts: list[Chained]) -> Chained:
    """Put heads side by side on the second axis."""
    return Chained(np.stack([part.value for part in parts], 1), np.stack([part.var for part in parts], 1))
