# SPDX-License-Identifier: Apache-2.0
"""What a recording says of one task, judged again on this host from what the recording holds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from hal_conformance.execution import known
from hal_conformance.execution.judging import Made, judge_outputs
from hal_conformance.execution.worker import too_large
from hal_conformance.numerics.absent import Coverage, Needed, partial
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.execution.plan import Task
    from hal_conformance.recordings.packed import Packed
    from hal_conformance.recordings.recording import Entry

_BY_TOKEN = frozenset({"y_TD", "dx_TD"})
_BY_ROW = frozenset({"y_RD", "dx_RD"})
_BY_EXPERT = frozenset({"dw1_EFD", "dw3_EFD", "dw2_EDF"})
_KNOWN = frozenset(
    {
        *_BY_TOKEN, *_BY_ROW, *_BY_EXPERT, "logits_TE", "scores_TE", "experts_TK", "weights_TK", "aux_loss", "z_loss",
        "dgate_ED", "dshared_w1_SD", "dshared_w3_SD", "dshared_w2_DS", "dshared_gate_D",
    }
)  # fmt: skip
"""Outputs of the experts and of a layer. In them an element depends on the experts' output for its token or row, on all
rows of the expert whose weight it is, on no expert, or (the gate's gradient) on everything."""

_NO_FACTS: Mapping[str, Any] = MappingProxyType({})

SLACK = 64 << 20
"""Bytes of a case's outputs beyond what it says that its large ones have."""


class Rejudge:
    """Judges the entries that several recordings have for one task: inputs are made once, the same bits judged once.

    Args:
        task: what was run.

    Attributes:
        coverage: how many elements were judged here, of how many; of the entry that came last.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._too_large = too_large(task.case.footprint(task.params))
        self._limit = SLACK + 2 * task.case.footprint(task.params).outputs
        self._known: dict[object, tuple[Judgement, Coverage]] = {}
        self.coverage = Coverage()

    @functools.cached_property
    def _made(self) -> Made | None:
        """Inputs and oracle, once there is something to judge; None: making them raised, and the judge says so."""
        with contextlib.suppress(Exception):
            return Made.of(self._task)
        return None

    def __call__(self, entry: Entry, contract: Contract, *, facts: Mapping[str, Any] = _NO_FACTS) -> Judgement:
        """Return the verdict: the recorder's, unless what it holds is red here.

        Args:
            entry: of a recording.
            contract: what the recorder's device promises.
            facts: of its manifest, which may show a known fault.
        """
        self.coverage = Coverage()
        if entry.status is not None or entry.claim is None:
            return Judgement(entry.status or Status.INVALID, detail=entry.detail or "without a reason in the recording")
        says_known = entry.claim.status is Status.KNOWN
        if says_known and not known.shows(facts, self._task.params.dtype):
            own = Judgement(Status.INVALID, detail="the recorder says KNOWN of what cannot have that fault")
            return agreed(entry.claim, own)
        if self._too_large:
            detail = f"{entry.claim.detail} (the recorder's verdict; here it {self._too_large})"
            return replace(entry.claim, detail=detail.strip())
        held = tuple((name, packed.content()) for name, packed in entry.outputs.items())
        key = (held, tuple(entry.hashes.items()), repr(contract), says_known)
        if key not in self._known:
            every = entry.outputs.values()
            whole = all(packed.grid is None for packed in every)
            with partial(self._needed(entry.outputs), whole=whole) as coverage:
                outputs, left = {}, self._limit
                for name, packed in entry.outputs.items():  # which a forged recording may have thousands of
                    outputs[name] = packed.array(left)
                    left -= outputs[name].nbytes if outputs[name].flags.c_contiguous else 0
                own = judge_outputs(self._task, outputs, entry.hashes, contract, self._made)
                if says_known and known.is_symptom(self._task, own.status, outputs, entry.hashes, contract):
                    # Only the recorder could see that it is gone without what has it.
                    own = replace(own, status=Status.KNOWN)
            if not coverage.shown and own.status.colour != "neutral" and own.status not in _NOT_LOOKED_AT:
                # A case that compares codes by itself: all of them.
                coverage = Coverage(sum(packed.values.size for packed in every), sum(packed.size for packed in every))
            self._known[key] = own, coverage
        own, self.coverage = self._known[key]
        return agreed(entry.claim, own)

    def _needed(self, outputs: Mapping[str, Packed]) -> Needed | None:
        """Return what of the experts has a part in an element that is held; None: any of it may have."""
        by_name: dict[str, list[Packed]] = {}
        for name, packed in outputs.items():
            by_name.setdefault(name.split("/")[0], []).append(packed)
        in_layer, alone = by_name.keys() & _BY_TOKEN, by_name.keys() & _BY_ROW
        if bool(in_layer) == bool(alone) or by_name.keys() - _KNOWN or len(outputs) > len(by_name):
            return None
        gate, logits = by_name.get("dgate_ED"), by_name.get("logits_TE")
        if gate and logits and logits[0].grid is None:
            return None  # the gate's gradient, which is made of all tokens, can be judged
        experts = [packed.held_rows() for name in _BY_EXPERT for packed in by_name.get(name, ())]
        rows = [packed.held_rows() for name in in_layer or alone for packed in by_name[name]]
        return Needed(*(frozenset(np.concatenate(held).tolist()) if held else frozenset() for held in (experts, rows)))


def agreed(claim: Judgement, own: Judgement) -> Judgement:
    """Return one verdict from the recorder's, on everything, and this host's, on what the recording holds.

    The worse one, of what is amber or red in either. Otherwise the recorder's stands: it had what this host has, and
    the rest.
    """
    status, detail = claim.status, claim.detail
    if _BADNESS[own.status.colour] > _BADNESS[claim.status.colour]:
        status, detail = own.status, f"{own.detail} (the recorder had {claim.status.value})"
    elif claim.status.colour == "red" and own.status.colour != "red":
        detail = f"{claim.detail} (the recorder's verdict; the elements that it recorded are {own.status.value})"
    detectors = {name: _larger(claim.detectors.get(name), own.detectors.get(name)) for name in claim.detectors}
    return Judgement(status, _larger(claim.margin, own.margin), detectors, detail)


_BADNESS = {"green": 0, "neutral": 1, "amber": 2, "red": 3}
"""A claim of green stands for nothing where this host finds that the contract promises nothing."""
_NOT_LOOKED_AT = frozenset({Status.INVALID, Status.FAIL_STRUCTURE, Status.CRASH})


def _larger(a: float | None, b: float | None) -> float | None:
    return max((n for n in (a, b) if n is not None), key=abs, default=None)
