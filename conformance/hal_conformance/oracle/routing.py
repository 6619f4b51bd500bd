# SPDX-License-Identifier: Apache-2.0
"""The router: scores, weights, and the gradient of its logits."""

from __future__ import annotations

import numpy as np

from hal.moe.router_spec import RouterSpec
from hal_conformance.case import F64, I64, Array
from hal_conformance.numerics.bounds import TINY32, U32, Bounded, half_ulp, sigmoid, softmax
from hal_conformance.numerics.budget import Level
from hal_conformance.numerics.chained import Chained

SATURATED = 1e4
"""Beyond this a sigmoid is 0 or 1 in float64: an infinite logit has the score of a very large one."""


def scores_of(logits_TE: Array, spec: RouterSpec, at: Level) -> Bounded:
    """Return the scores of the device's own logits.

    Of a token with a logit of NaN or +inf (or nothing but -inf) a softmax is NaN throughout. A sigmoid is NaN of NaN, 1
    of +inf and 0 of -inf.
    """
    exact = np.asarray(logits_TE, np.float64)
    if spec.score == "sigmoid":
        return sigmoid(np.clip(exact, -SATURATED, SATURATED)).stored("float32")
    return softmax(exact, at).stored("float32")


def scores_between(logits: Bounded, spec: RouterSpec, at: Level) -> Bounded:
    """Return the scores of logits that are known to a bound: of every device that keeps it.

    A score rises with its own logit, and a softmax falls with each other one: its ends are reached where all others are
    at their other end. The scores' own rounding is relative to them.
    """
    rounded = scores_of(logits.value, spec, at)
    low, high = logits.value - logits.bound, logits.value + logits.bound
    if spec.score == "sigmoid":
        ends = [1.0 / (1.0 + np.exp(-np.clip(end, -SATURATED, SATURATED))) for end in (low, high)]
    else:
        top = high.max(-1, keepdims=True)
        least, most = np.exp(low - top), np.exp(high - top)
        ends = [least / (least + most.sum(-1, keepdims=True) - most),
                most / (most + least.sum(-1, keepdims=True) - least)]  # fmt: skip
    spread = np.maximum(ends[1] - rounded.value, rounded.value - ends[0])
    larger = np.maximum(1.0, ends[1] / np.maximum(rounded.value, TINY32))
    return Bounded.deterministic(rounded.value, spread + rounded.bound * larger)


def weights_of(scores: Bounded, experts_TK: I64, spec: RouterSpec, storage: str) -> Bounded:
    """Return the weights of chosen experts.

    A weight inherits its score's relative error e_j. Normalising adds the score-weighted error of the sum, K - 1
    roundings of additions, one of the epsilon's and two of a division; the factor adds one: K + 4 in all.
    """
    rows = np.arange(len(experts_TK))[:, None]
    s, b = scores.value[rows, experts_TK], scores.bound[rows, experts_TK]
    if not spec.normalize:
        value, bound = s * spec.scaling_factor, (b + 2.0 * U32 * s) * spec.scaling_factor
    else:
        total = s.sum(1, keepdims=True) + spec.normalize_epsilon
        value = s / total * spec.scaling_factor
        inherited = b / total * spec.scaling_factor
        bound = inherited + value * (b.sum(1, keepdims=True) / total + (spec.top_k + 4) * U32)
    return Bounded.deterministic(value, bound).stored(storage)


def logits_gradient(
    dweights: Chained, scores: Bounded, experts_TK: I64, spec: RouterSpec, dscores_TE: Chained | None = None
) -> Chained:
    """Return the gradient of the logits from that of the weights, [T, K], and of the scores, if any; not stored.

    Each step is linear in the gradient above it, with coefficients made of scores: the variance of the one, plus the
    coefficients' relative error squared times the sum of absolute terms squared, since differences cancel.
    """
    dw, var_dw = dweights.value, dweights.var
    at = np.arange(len(dw))[:, None]
    s, error = scores.value[at, experts_TK], scores.bound[at, experts_TK]
    relative = (error / s).max(1, keepdims=True) + (spec.top_k + 4) * U32
    if spec.normalize:
        total = s.sum(1, keepdims=True) + spec.normalize_epsilon
        share, factor = s / total, spec.scaling_factor / total
        ds = factor * (dw - (dw * share).sum(1, keepdims=True))
        size = factor * (np.abs(dw) + (np.abs(dw) * share).sum(1, keepdims=True))
        var_ds = 2 * factor**2 * (var_dw + (share**2 * var_dw).sum(1, keepdims=True)) + (size * 2 * relative) ** 2
    else:
        ds, var_ds = dw * spec.scaling_factor, spec.scaling_factor**2 * (var_dw + (dw * relative) ** 2)
    full, var_full = np.zeros_like(scores.value), np.zeros_like(scores.value)
    full[at, experts_TK], var_full[at, experts_TK] = ds, var_ds
    if dscores_TE is not None:
        full = full + dscores_TE.value
        var_full = var_full + dscores_TE.var + (U32 * full) ** 2 / 3.0
    q: F64 = scores.value
    if spec.score == "softmax":
        dlogits = q * (full - (q * full).sum(1, keepdims=True))
        size = q * (np.abs(full) + (q * np.abs(full)).sum(1, keepdims=True))
        var = 2 * q**2 * (var_full + (q**2 * var_full).sum(1, keepdims=True))
        var = var + (size * (2 * scores.bound / np.maximum(q, TINY32) + 4 * U32 + relative)) ** 2
    else:
        dlogits = full * q * (1 - q)
        var = (q * (1 - q)) ** 2 * var_full + (full * (2 * scores.bound + 4 * U32 * q)) ** 2
    return Chained(dlogits, var)


def stored_logits_gradient(
    dweights: Chained,
    scores: Bounded,
    experts_TK: I64,
    spec: RouterSpec,
    storage: str,
    dscores_TE: Chained,
    dlogits_TE: Chained,
) -> Chained:
    """Return the gradient of the stored logits from those of the weights, the scores and the logits, stored.

    The three may meet in any order. Each may be stored before (weights that are a softmax of the chosen logits never
    pass through the scores), and so is each sum: where they cancel, that is what is left.
    """
    alone = logits_gradient(dweights, scores, experts_TK, spec).value
    total = logits_gradient(dweights, scores, experts_TK, spec, dscores_TE) + dlogits_TE
    parts = (alone, total.value - dlogits_TE.value - alone, dlogits_TE.value)
    deviation = 4.0 * np.sqrt(total.var)
    each = [half_ulp(np.abs(part) + deviation, storage) for part in parts]
    pair = np.max([half_ulp(np.abs(total.value - part) + deviation, storage) for part in parts], axis=0)
    var = total.var + (sum(half**2 for half in each) + pair**2) / 3.0
    return Chained(total.value, var).stored(storage)
