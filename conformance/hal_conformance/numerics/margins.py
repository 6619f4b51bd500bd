# SPDX-License-Identifier: Apache-2.0
"""Routing judged by margin: where the gap exceeds the error, the expert set is certain; elsewhere it is open.

An expert's selection score lies in [value - bound, value + bound]. An expert certainly belongs to the K best if fewer
than K others can reach its lower end; it certainly does not if K others certainly exceed its upper end. What
lies between is open, and any choice among it is right. With groups, the same holds one level up, and an expert of an
open group is open, too.

Legend: T tokens, E experts, K choices, G groups.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hal.moe.router_spec import RouterSpec
from hal_conformance.case import F64, I64
from hal_conformance.numerics.absent import looked_at
from hal_conformance.numerics.bounds import U32, Bounded
from hal_conformance.numerics.detectors import Finding
from hal_conformance.verdicts import Status

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """Selection scores, known to intervals; [.., n] each."""

    low: F64
    high: F64

    def admits(self, chosen: Mask) -> bool:
        """Tell whether these of one row can be its best at once: none is certainly beaten by one left out.

        An exact tie of exact numbers goes to the lower index, as the operator defines.
        """
        index = np.arange(len(chosen))
        for i in np.flatnonzero(chosen):
            beaten = self.low > self.high[i]
            if self.low[i] == self.high[i]:
                beaten |= (self.low == self.high) & (self.low == self.low[i]) & (index < i)
            if (beaten & ~chosen).any():
                return False
        return True


@dataclass(frozen=True)
class Certainty:
    """What is certain of each token's choice.

    Attributes:
        must, may: for each token and expert whether it must be chosen and whether it may be, judged singly; [T, E].
        experts: the selection scores, [T, E]; None where anything goes.
        groups: the scores of the groups, [T, G]; None where there is one group.
        kept: for each token and group whether it must be kept and whether it may be; [T, G] each.
        spec: the router.
    """

    must: Mask
    may: Mask
    experts: Scored | None = None
    groups: Scored | None = None
    kept: Certainty | None = None
    spec: RouterSpec | None = None

    def admits(self, token: int, chosen: I64) -> bool:
        """Tell whether a set of experts can be the right one as a whole.

        Each may be possible singly and all of them not: with two open groups of which one can win, no set takes
        from both. Group sets are enumerated; where there are too many, the set is taken as possible.
        """
        if self.experts is None or self.spec is None:
            return True
        spec = self.spec
        scores = Scored(self.experts.low[token], self.experts.high[token])
        if np.isneginf(scores.low).all() and np.isposinf(scores.high).all():  # nothing is known of this token
            return True
        picked = np.zeros(spec.num_experts, bool)
        picked[chosen] = True
        if self.groups is None or self.kept is None:
            return scores.admits(picked)
        groups = Scored(self.groups.low[token], self.groups.high[token])
        surely, possibly = self.kept.must[token], self.kept.may[token]
        must, open_ = np.flatnonzero(surely), np.flatnonzero(possibly & ~surely)
        free = spec.top_groups - len(must)
        if math.comb(len(open_), free) > MAX_GROUP_SETS:
            return True
        for extra in itertools.combinations(open_, free):
            kept = np.zeros(spec.num_groups, bool)
            kept[must] = kept[list(extra)] = True
            if not groups.admits(kept):
                continue
            inside = np.repeat(kept, spec.group_size)
            masked = Scored(
                np.where(inside, scores.low, spec.masked_score), np.where(inside, scores.high, spec.masked_score)
            )
            if masked.admits(picked):
                return True
        return False

    def out_of_order(self, experts_TK: I64) -> Mask:
        """Return [T, K - 1]: whether a choice certainly scores less than the one that follows it.

        Experts of groups that may be masked are left out.
        """
        rows = np.arange(len(experts_TK))[:, None]
        if self.experts is None or self.spec is None:
            return np.zeros((len(experts_TK), experts_TK.shape[1] - 1), bool)
        low, high = self.experts.low[rows, experts_TK], self.experts.high[rows, experts_TK]
        wrong: Mask = low[:, 1:] > high[:, :-1]
        if self.kept is not None:
            sure = self.kept.must[rows, experts_TK // self.spec.group_size]
            wrong &= sure[:, 1:] & sure[:, :-1]
        return wrong


MAX_GROUP_SETS = 1000


def k_best(low: F64, high: F64, k: int) -> Certainty:
    """Return who must and who may be among the `k` best of the last axis, for scores [.., n] known to intervals.

    Fewer than k others can reach the lower end of one that exceeds the (k + 1)-th largest upper end, of which its own
    is one; fewer than k others certainly exceed an upper end that is not below the k-th largest lower end. An exact tie
    of exact numbers (low = high for both) goes to the lower index, as the operator defines: rows with exact numbers
    that are in question are compared pair by pair.
    """
    n = low.shape[-1]
    if k >= n:
        return Certainty(np.ones(low.shape, bool), np.ones(low.shape, bool))
    least = np.partition(low, n - k, axis=-1)[..., n - k, None]
    must, may = low > np.partition(high, n - k - 1, axis=-1)[..., n - k - 1, None], high >= least
    tied = ((low == high) & (low >= least)).sum(-1) > 1
    if tied.any():
        must[tied], may[tied] = _pair_by_pair(low[tied], high[tied], k)
    return Certainty(must, may)


def _pair_by_pair(low: F64, high: F64, k: int) -> tuple[Mask, Mask]:
    """Return who must and who may be among the `k` best, with ties."""
    index = np.arange(low.shape[-1])
    sure = low == high
    before = index[:, None] > index[None, :]  # [i, j]: j comes before i
    tie = (low[..., None, :] == high[..., :, None]) & sure[..., None, :] & sure[..., :, None]
    other = index[:, None] != index[None, :]
    # beats[i, j]: j certainly ranks before i. reaches[i, j]: j possibly ranks before i.
    beats = ((low[..., None, :] > high[..., :, None]) | (tie & before)) & other
    reaches = (high[..., None, :] >= low[..., :, None]) & ~(tie & ~before) & other
    return reaches.sum(-1) < k, beats.sum(-1) < k


def certify(scores: Bounded, bias_E: F64 | None, spec: RouterSpec) -> Certainty:
    """Return which experts each token must and may choose, from scores [T, E] and their bounds."""
    value, bound = scores.value, scores.bound
    if bias_E is not None:
        value = value + bias_E
        bound = bound + U32 * (np.abs(value) + bound)  # one float32 addition
    low, high = value - bound, value + bound
    # Of a token that is not finite nothing is known, and any experts are right.
    unknown = ~(np.isfinite(low) & np.isfinite(high)).all(1)
    low[unknown], high[unknown] = -np.inf, np.inf
    scored = Scored(low, high)
    if spec.num_groups == 1:
        single = k_best(low, high, spec.top_k)
        return Certainty(single.must, single.may, scored, spec=spec)
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
    single = k_best(masked_low, masked_high, spec.top_k)
    return Certainty(single.must, single.may, scored, Scored(group_low, group_high), groups, spec)


def judge_choice(experts_TK: I64, certain: Certainty, what: str = "experts") -> Finding:
    """Judge chosen experts: distinct, in range, none that may not be, all that must be, possible as a set, in order."""
    tokens, experts = certain.must.shape
    known = int((certain.must | ~certain.may).any(1).sum())  # of others any experts are right
    looked_at(known * experts_TK.shape[1], experts_TK.size)
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
    open_ = np.flatnonzero((certain.may & ~certain.must).any(1))
    impossible = [int(t) for t in open_ if not certain.admits(int(t), experts_TK[t])]
    if impossible:
        t = impossible[0]
        return Finding(
            Status.FAIL_DISCRETE, exact=len(impossible) / tokens,
            detail=f"{what}: {len(impossible)} of {tokens} tokens; token {t}: each of the experts "
            f"{sorted(map(int, experts_TK[t]))} may be chosen, but not all of them at once",
        )  # fmt: skip
    disorder = certain.out_of_order(experts_TK)
    if disorder.any():
        t, k = (int(i) for i in np.argwhere(disorder)[0])
        return Finding(
            Status.FAIL_DISCRETE, exact=float(disorder.any(1).mean()),
            detail=f"{what}: token {t}, choices {k} and {k + 1}: expert {experts_TK[t, k]} certainly scores less than "
            f"{experts_TK[t, k + 1]}, and comes first",
        )  # fmt: skip
    if not len(open_):
        return Finding(Status.PASS)
    # Where the choice is open the set may or may not be the oracle's; either is right.
    open_tokens = len(open_)
    return Finding(Status.PASS_AMBIGUOUS, detail=f"{what}: the margin leaves {open_tokens} of {tokens} tokens open")
