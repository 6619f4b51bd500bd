# SPDX-License-Identifier: Apache-2.0
"""What may be a known fault (`known`) is run again in new processes, without what brings the fault on and with it.

A fault of the subject's own that is there in a share p of all processes, whatever these are, passes for the known one
only if it is there in three processes and is not in two: in p^3 (1 - p)^2 of all runs, which is at most 3.5 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from hal_conformance.execution import known
from hal_conformance.execution.judging import judge
from hal_conformance.result import Result
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.execution.observation import Observation
    from hal_conformance.execution.plan import Task
    from hal_conformance.execution.runner import Runner

Verdict = TypeVar("Verdict", Judgement, Result)

PROCESSES: Sequence[Mapping[str, str]] = (known.AVOIDED, known.AVOIDED, {}, {})
"""The environment of each. Those without come first, since what is gone once some processes have run, such as a cache
that they fill, is gone in those that follow; and not by turns, as what has a period comes and goes."""


@dataclass(frozen=True)
class Retrial:
    """What came of it.

    Attributes:
        without: the verdict without what brings the fault on, where that was green or amber in each process, and each
            of the others had the symptom; None: it was not so.
        why: what was not so.
    """

    without: Status | None
    why: str = ""

    def of(self, found: Verdict) -> Verdict:
        """Return the verdict on what was red, and was tried again."""
        if self.without is None:
            remark = f"nothing but NaN and infinities, as of a known fault ({known.WHERE}), but {self.why}"
            return replace(found, detail=f"{found.detail}; {remark}")
        without = f"{self.without.value} without AMX, a fault of oneDNN's ({known.WHERE})"
        return replace(found, status=Status.KNOWN, detail=f"{without}; with it {found.status.value}: {found.detail}")


def tried_again(runner: Runner, tasks: Sequence[Task], contract: Contract) -> Iterator[tuple[Task, Retrial]]:
    """Run tasks again, each as long as it goes as with the known fault; yield what came of each."""
    suspects = list(tasks)
    verdicts: dict[Task, Status] = {}
    if suspects:
        runner.rest()  # its memory may be what the others need
    for environment in PROCESSES if suspects else ():
        left = []
        with runner.another(environment) as other:
            for seen in other.observe(suspects):
                status = judge(seen, contract, "", "").status
                why = _without(other, seen, status) if environment else _with(other, seen, status, contract)
                if why:
                    yield seen.task, Retrial(None, why)
                else:
                    left.append(seen.task)
                    verdicts.setdefault(seen.task, status)
        suspects = left
    for task in suspects:
        yield task, Retrial(verdicts[task])


def _without(runner: Runner, seen: Observation, status: Status) -> str:
    if status.colour not in ("green", "amber"):
        return f"without AMX it was {status.value}{_said(seen)}"
    return "" if known.avoids(runner.opened) else "it shows in a process without AMX, too"


def _with(runner: Runner, seen: Observation, status: Status, contract: Contract) -> str:
    if known.suspected(runner.opened, contract, seen, status):
        return ""
    return f"run again with AMX it was {status.value}{_said(seen)}"


def _said(seen: Observation) -> str:
    return f" ({seen.detail})" if seen.status is not None and seen.detail else ""
