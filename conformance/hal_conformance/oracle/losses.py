# SPDX-License-Identifier: Apache-2.0
"""The router's losses: value and gradient, in float32."""

from __future__ import annotations

import numpy as np

from hal.moe.router_spec import RouterSpec
from hal_conformance.case import I64, Array
from hal_conformance.numerics.bounds import EXP, U32, Bounded, positive_sum
from hal_conformance.numerics.budget import level

MEGATRON_EPSILON = 1e-20


def aux_loss(scores_TE: Array, experts_TK: I64, spec: RouterSpec) -> tuple[Bounded, Bounded]:
    """Return E / (K T) sum_e count_e mean_t p_te and its gradient with respect to the scores.

    Value: every term is positive, so relative errors add: normalising (a sum over E, a division), the mean over T, the
    product, the sum over E. Gradient: c_e / T for softmax; through the normalisation (c_e - sum_j c_j p_j) / (T S),
    whose rounding errors are relative to c_e + sum_j c_j p_j because the difference cancels.
    """
    scores = np.asarray(scores_TE, np.float64)
    tokens, experts = scores.shape
    at = level(scores.size)
    counts = np.bincount(experts_TK.reshape(-1), minlength=experts)
    share = counts * (experts / (spec.top_k * tokens))
    relative, normal, p_TE = 4 * U32, np.ones((tokens, 1)), scores
    if spec.score == "sigmoid":
        normal = scores.sum(1, keepdims=True) + MEGATRON_EPSILON
        p_TE = scores / normal
        relative = relative + 4 * U32 + float(positive_sum(normal[:, 0], scores, 1, at).max())
    columns = p_TE.mean(0)
    relative = relative + float(positive_sum(p_TE.sum(0), p_TE, 0, at).max())
    loss = np.asarray(float(share @ columns))
    summed = float(positive_sum(loss, share * columns, 0, at))
    value = Bounded.deterministic(loss, np.abs(loss) * (relative + summed)).stored("float32")
    if spec.score == "softmax":
        gradient = np.broadcast_to(share / tokens, scores.shape)
        size = gradient
    else:
        mean = (share * p_TE).sum(1, keepdims=True)
        gradient = (share - mean) / (tokens * normal)
        size = (share + mean) / (tokens * normal)
        relative = relative + float(positive_sum(mean[:, 0], share * p_TE, 1, at).max())
    return value, Bounded.deterministic(gradient, size * (relative + 4 * U32)).stored("float32")


def z_loss(logits_TE: Array) -> tuple[Bounded, Bounded]:
    """Return mean_t logsumexp(logits_t)^2 and its gradient.

    L = m + log sum exp(x - m) has the absolute error e = the p-weighted relative errors of exp, the summation's, 2 ulp
    of log, and a rounding of L. L^2 has 2 |L| e + u L^2; the mean adds a sum of positive terms. The gradient 2 L p / T
    has e / |L|, p's own error twice over (its own and the sum's), and four roundings.
    """
    x = np.asarray(logits_TE, np.float64)
    tokens, at = len(x), level(x.size)
    top = x.max(1, keepdims=True)
    d = np.where(np.isneginf(x), 0.0, top - x)  # exp(-inf) is 0, without an error
    e = np.where(np.isneginf(x), 0.0, np.exp(-d))
    total = e.sum(1, keepdims=True)
    p_TE = e / total
    log = np.log(total)
    lse = top + log
    eps = EXP + 3.0 * U32 * d
    common = (p_TE * eps).sum(1, keepdims=True) + positive_sum(total[:, 0], e, 1, at)[:, None]
    error = common + 4.0 * U32 * np.abs(log) + U32 * np.abs(lse)
    squares = lse[:, 0] ** 2
    loss = np.asarray(squares.mean())
    own = (2.0 * np.abs(lse[:, 0]) * error[:, 0] + 2.0 * U32 * squares).mean()
    summed = float(positive_sum(squares.sum(), squares, 0, at)) + 2.0 * U32
    value = Bounded.deterministic(loss, own + loss * summed).stored("float32")
    gradient = 2.0 * lse * p_TE / tokens
    bound = 2.0 * p_TE / tokens * (error + np.abs(lse) * (eps + common + error + 6.0 * U32 + U32 * np.abs(lse)))
    return value, Bounded.deterministic(gradient, bound).stored("float32")
