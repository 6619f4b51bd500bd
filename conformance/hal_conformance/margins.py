# SPDX-License-Identifier: Apache-2.0
"""Routing judged by margin: where the gap exceeds the error, the expert set is certain; elsewhere it is open.

An expert's selection score lies in [value - bound, value + bound]. An expert certainly belongs to the K best if fewer
than K others can reach its lower end; it certainly does not if K others certainly exceed its upper end. What
lies between is open, and any choice among it is right. With groups, the same holds one level up, and an expert of an
open group is open, too.

Legend: T tokens, E experts, K choices, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hal.moe.router_spec import RouterSpec
from hal_conformance.bounds import U32, Bounded
from hal_conformance.case import F64, I64
from hal_conformance.detectors import Finding
from hal_conformance.verdicts import Status

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Certainty:
    """For each token and expert whether it must be chosen and whether it may be; [T, E] each."""

    must: Mask
    may: Mask


def k_best(low: F64, high: F64, k: int) -> Certainty:
    """Return who must and who may be among the `k` best of the last axis, for scores known to intervals.

    An exact tie of exact numbers (low = high for both) goes to the lower index, as the operator defines.
    """
    n = low.shape[-1]
    index = np.arange(n)
    sure = low == high
    before = index[:, None] > index[None, :]  # [i, j]: j comes before i
    tie = (low[..., None, :] == high[..., :, None]) & sure[..., None, :] & sure[..., :, None]
    other = index[:, None] != index[None, :]
    # beats[i, j]: j certainly ranks before i. reaches[i, j]: j possibly ranks before i.
    beats = ((low[..., None, :] > high[..., :, None]) | (tie & before)) & other
    reaches = (high[..., None, :] >= low[..., :, None]) & ~(tie & ~before) & other
    return Certainty(must=reaches.sum(-1) < k, may=beats.sum(-1) < k)


def certify(scores: Bounded, bias_E: F64 | None, spec: RouterSpec) -> Certainty:
    """Return which experts each token must and may choose, from scores [T, E] and their bounds."""
    value, bound = scores.value, scores.bound
    if bias_E is not None:
        value = value + bias_E
        bound = bound + U32 * (np.abs(value) + bound)  # one float32 addition
    low, high = value - bound, value + bound
    if spec.num_groups == 1:
        return k_best(low, high, spec.top_k)
    tokens = value.shape[0]
    grouped = (tokens, spec.num_groups, spec.group_size)
    if spec.group_score == "max":
        group_low, group_high = (side.reshape(grouped).max(-1) for side in (low, high))
    else:
        group_low, group_high = (np.sort(side.reshape(grouped), -1)[..., -2:].sum(-1) for side in (low, high))
        widen = U32 * np.maximum(np.abs(group_low), np.abs(group_high)) * (bound.any(-1, keepdims=True))
        group_low, group_high = group_low - widen, group_high + widen
    groups = k_best(group_low, group_high, spec.top_groups)
    must_group, may_group = (np.repeat(mask, spec.group_size, axis=1) for mask in (groups.must, groups.may))
    # Outside the chosen groups an expert scores `masked_score`; of an open group it may score either.
    masked_low = np.where(must_group, low, np.minimum(low, spec.masked_score))
    masked_high = np.where(may_group, high, spec.masked_score)
    masked_low = np.where(may_group, masked_low, spec.masked_score)
    return k_best(masked_low, masked_high, spec.top_k)


def judge_choice(experts_TK: I64, certain: Certainty, what: str = "experts") -> Finding:
    """Judge chosen experts: distinct, in range, none that may not be, all that must be."""
    tokens, experts = certain.must.shape
    if experts_TK.size and (experts_TK.min() < 0 or experts_TK.max() >= experts):
        t, k = (int(i) for i in np.argwhere((experts_TK < 0) | (experts_TK >= experts))[0])
        return Finding(Status.FAIL_DISCRETE, detail=f"{what}: token {t} chose expert {experts_TK[t, k]} of {experts}")
    chosen = np.zeros((tokens, experts), np.int64)
    np.add.at(chosen, (np.arange(tokens)[:, None], experts_TK), 1)
    for mask, text in (
        (chosen > 1, "chose it twice"),
        ((chosen > 0) & ~certain.may, "chose it, and K others certainly score higher"),
        ((chosen == 0) & certain.must, "did not choose it, and it certainly is among the K best"),
    ):
        if mask.any():
            t, e = (int(i) for i in np.argwhere(mask)[0])
            count = int(mask.any(1).sum())
            return Finding(
                Status.FAIL_DISCRETE, exact=count / tokens,
                detail=f"{what}: {count} of {tokens} tokens; token {t}, expert {e}: {text}",
            )  # fmt: skip
    open_tokens = int((certain.may & ~certain.must).any(1).sum())
    exact = Finding(Status.PASS)
    if not open_tokens:
        return exact
    # Where the choice is open the set may or may not be the oracle's; either is right.
    return Finding(Status.PASS_AMBIGUOUS, detail=f"{what}: the margin leaves {open_tokens} of {tokens} tokens open")
