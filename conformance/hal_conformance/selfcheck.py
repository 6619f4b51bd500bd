# SPDX-License-Identifier: Apache-2.0
"""The suite checks itself: every fault must be flagged and no benign variation, each a subject like a user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance import arrays as codec
from hal_conformance.case import FAMILIES
from hal_conformance.execution import known
from hal_conformance.execution.judging import judge, judge_outputs, result
from hal_conformance.execution.plan import Catalogue, Task, plan
from hal_conformance.execution.process import many_kernels
from hal_conformance.execution.retrial import tried_again
from hal_conformance.execution.runner import Runner
from hal_conformance.execution.subject import Subject
from hal_conformance.pool import pool
from hal_conformance.verdicts import Status
from hal_conformance.version import suite_version

if TYPE_CHECKING:
    from hal_conformance.case import Case
    from hal_conformance.execution.observation import Observation
    from hal_conformance.execution.plan import Selection
    from hal_conformance.faults.catalogue import Variation
    from hal_conformance.result import Result
    from hal_conformance.verdicts import Judgement

SCHEMA = "hal.selfcheck/1"

PRESETS = ("ling-lite", "ling-2.0-mini", "mixtral-8x7b", "qwen2-moe")
"""One router of each kind: softmax with shared experts, sigmoid with groups and a bias, few experts, a shared gate."""

DETECTORS = ("bound", "rms", "bias", "exact", "discrete", "nonfinite", "structure", "nondet", "crash")
"""The four detectors, and the verdicts that need none of them."""

BATCH = 12
"""Variations that share a worker: starting one takes as long as a dozen variations of a norm."""

CASE_S = 300.0
"""Seconds for one case: a variation may be compiled in its first, on a machine that is busy with the others."""


def flagged_by(row: Result) -> set[str]:
    """Return what in a result speaks against the subject; empty if nothing does."""
    if row.status.colour in ("green", "neutral") or row.status in (Status.INVALID, Status.KNOWN):
        return set()
    by = {
        Status.FAIL_DISCRETE: {"discrete"}, Status.FAIL_NONFINITE: {"nonfinite"}, Status.FAIL_STRUCTURE: {"structure"},
        Status.NONDET: {"nondet"}, Status.CRASH: {"crash"}, Status.HANG: {"crash"},
    }.get(row.status, set())  # fmt: skip
    found = dict(row.detectors)
    if row.status is not Status.FAIL_DISCRETE and found["exact"]:
        by = by | {"exact"}
    limits = ("bound", "rms", "bias")
    # A margin that is not finite is None, with the number in words: beyond every bound.
    return by | {name for name in limits if (value := found[name]) is not None and abs(value) > 1.0} or {"bound"}


@dataclass
class Outcome:
    """What the suite said of one variation.

    Attributes:
        by: for each of `DETECTORS` in how many results it spoke against the subject.
        cases: the cases that flagged it, in the order of the suite.
        judged: results that were green, amber or red.
        invalid: results of which nothing can be said: the judge failed, which no subject may bring about.
        details: of the first results that are not green.
        seconds: that its cases ran.
    """

    variation: Variation
    by: Counter[str] = field(default_factory=Counter)
    cases: list[str] = field(default_factory=list)
    judged: int = 0
    invalid: int = 0
    details: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, row: Result) -> None:
        """Take in one result."""
        self.judged += row.status.colour != "neutral"
        self.invalid += row.status is Status.INVALID
        self.seconds += row.seconds
        by = flagged_by(row)
        self.by.update(by)
        name = row.case.partition("[")[0]
        if by and name not in self.cases:
            self.cases.append(name)
        if (by or row.status is Status.INVALID) and len(self.details) < 3:
            self.details.append(f"{row.case} {row.dtype}: {row.status.value}: {row.detail}")

    @property
    def right(self) -> bool:
        """Tell whether a fault was flagged, or a benign variation was judged and was not."""
        if self.invalid:
            return False
        return bool(self.cases) if self.variation.kind == "fault" else bool(self.judged) and not self.cases

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as plain JSON values."""
        of = self.variation
        return {
            "name": of.name, "kind": of.kind, "what": of.what, "bug": of.bug, "families": list(of.families),
            "right": self.right, "judged": self.judged, "invalid": self.invalid,
            "by": {name: self.by[name] for name in DETECTORS}, "cases": self.cases, "details": self.details,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip


def place(variation: Variation) -> tuple[bool, int]:
    """Return what variations are sorted by: faults first, and each kind in the order of the families."""
    return variation.kind == "benign", min((FAMILIES.index(name) for name in variation.families), default=-1)


def tasks(selection: Selection, cases: Sequence[Case], variation: Variation) -> list[Task]:
    """Return the tasks of one variation: of the operators that it changes, those of `PRESETS`, and of cases that have
    none of them.

    A benign variation must be green in every dtype; a fault is looked for in float32 and bfloat16, and where
    a case has no other dtype in float16.
    """
    ops = variation.make()
    touched = {
        case.name
        for case in cases
        if case.family in (variation.families or (case.family,))
        and all(callable(getattr(ops, need, None)) for need in case.needs)
    }
    every = [task for task in plan(selection, cases) if task.case.name in touched]
    covered = {task.case.name for task in every if task.params.preset in PRESETS}
    return [
        task
        for task in every
        if (task.params.preset in PRESETS or task.case.name not in covered)
        and (variation.kind == "benign" or task.params.dtype != "float16" or task.case.dtypes() == ("float16",))
    ]


def run(
    chosen: Mapping[Variation, Sequence[Task]], selection: Selection, *, jobs: int = 1,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run each variation on the CPU through the door of `--impl`.

    Some variations after each other share a worker, which ends with the first of them that hangs or dies in it.

    Args:
        chosen: variations with their tasks, from `tasks`.
        selection: what the tasks were planned from.
        jobs: processes that judge, each with a worker of its own.
        on_outcome: called with each outcome, as they come.
    """
    names = [variation.name for variation, its_tasks in chosen.items() if its_tasks]
    found = {variation.name: Outcome(variation) for variation in chosen}
    for outcome in _outcomes([names[at : at + BATCH] for at in range(0, len(names), BATCH)], selection, jobs):
        found[outcome.variation.name] = outcome
        if on_outcome:
            on_outcome(outcome)
    return list(found.values())


def _outcomes(batches: Sequence[Sequence[str]], selection: Selection, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        for batch in batches:
            yield from _batch(batch, selection)
        return
    judges = pool(jobs)
    try:
        for outcomes in judges.map(_list_of_batch, batches, [selection] * len(batches)):
            yield from outcomes
    finally:
        judges.shutdown(cancel_futures=True)


def _list_of_batch(names: Sequence[str], selection: Selection) -> list[Outcome]:
    return list(_batch(names, selection))


def _batch(names: Sequence[str], selection: Selection) -> Iterator[Outcome]:
    """Run some variations, known by name since they cross processes, in one worker after each other."""
    from hal_conformance.faults import VARIATIONS

    cases = Catalogue().all()
    first, environment = Subject("cpu", f"hal_conformance.faults:{names[0]}"), many_kernels(selection.scale)
    with Runner(first, case_s=CASE_S, environment=environment) as runner:
        for name in names:
            outcome = Outcome(VARIATIONS[name])
            runner.change(f"hal_conformance.faults:{name}")
            contract = Contract.from_json(runner.opened["contract"])
            suspects: dict[Task, Result] = {}
            for observation in runner.observe(tasks(selection, cases, outcome.variation)):
                row = _judged(observation, contract, name)
                if known.suspected(runner.opened, contract, observation, row.status):
                    suspects[observation.task] = row
                else:
                    outcome.add(row)
            if outcome.cases:  # it is flagged without these
                for row in suspects.values():
                    outcome.add(row)
            else:
                for task, retrial in tried_again(runner, list(suspects), contract):
                    outcome.add(retrial.of(suspects[task]))
            yield outcome


_KNOWN: dict[object, Judgement] = {}
"""Judgements of this process: most of what a small fault returns are the bits of what it was made from, judged once."""


def _judged(observation: Observation, contract: Contract, name: str) -> Result:
    task = observation.task
    if observation.status is not None:
        return judge(observation, contract, "cpu", name)
    made, given = codec.digests(observation.outputs), observation.hashes
    key = (task.case.name, task.params, repr(contract), *sorted(made.items()), *sorted(given.items()))
    if key not in _KNOWN:
        _KNOWN[key] = judge_outputs(task, observation.outputs, given, contract)
    return result(task, _KNOWN[key], "cpu", name, observation.seconds)


def as_json(outcomes: Sequence[Outcome], selection: Selection, seconds: float) -> dict[str, Any]:
    """Return the self-check in the form `hal.selfcheck/1`."""
    return {
        "schema": SCHEMA, "suite": suite_version(), "seed": selection.seed, "scale": selection.scale,
        "outcomes": [outcome.as_json() for outcome in outcomes],
        "faults": {"total": _count(outcomes, "fault"), "flagged": _count(outcomes, "fault", right=True)},
        "benign": {"total": _count(outcomes, "benign"), "green": _count(outcomes, "benign", right=True)},
        "seconds": round(seconds, 3),
    }  # fmt: skip


def _count(outcomes: Sequence[Outcome], kind: str, *, right: bool = False) -> int:
    return sum(o.variation.kind == kind and (o.right or not right) for o in outcomes)


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return 0 if every fault was flagged and every benign variation green, otherwise 1."""
    return 0 if outcomes and all(outcome.right for outcome in outcomes) else 1
