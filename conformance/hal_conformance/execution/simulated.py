# SPDX-License-Identifier: Apache-2.0
"""What need not be run on a simulated device: what cannot differ from the CPU, and what takes long unasked.

Of such a device only the matrix unit is simulated; all else is what the CPU computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hal_conformance.execution.judging import result
from hal_conformance.execution.subject import PORTABLE
from hal_conformance.result import DETECTORS
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    from hal_conformance.execution.plan import Task
    from hal_conformance.execution.subject import Subject
    from hal_conformance.result import Result


def same_as_cpu(opened: Mapping[str, Any], impl: str, on_cpu: Mapping[Task, Result]) -> dict[Task, Result]:
    """Return the rows of cases that need not be run on a device, since they were on the CPU.

    Of an implementation of somebody else's nobody knows which of its operators multiply; all of its cases are run.

    Args:
        opened: what `subject.describe` says of the device.
        impl: the implementation.
        on_cpu: the results of the CPU and the portable implementation.
    """
    info = opened["info"]
    if not info.get("simulated") or info.get("torch_device") != "cpu" or impl != PORTABLE:
        return {}
    return {
        task: replace(
            row, subject=str(info["id"]), status=Status.SAME_AS_CPU, margin=None,
            detectors=dict.fromkeys(DETECTORS), detail=row.status.value, seconds=0.0,
        )
        for task, row in on_cpu.items()
        # Of a dtype that the device does not have the worker says so.
        if not task.case.multiplies and task.params.dtype in opened["contract"]["matmul"]
    }  # fmt: skip


def as_on_cpu(rows: Iterable[Result]) -> list[Result]:
    """Return results with the CPU's verdict in place of the remark that it is the same."""
    found = list(rows)
    of = {(r.case, r.dtype): r for r in found if (r.subject, r.impl) == ("cpu", PORTABLE)}
    return [
        replace(of[row.case, row.dtype], subject=row.subject) if row.status is Status.SAME_AS_CPU else row
        for row in found
    ]


def left_out(subject: Subject, scale: str, opened: Mapping[str, Any] | None = None) -> str:
    """Return why a device that nobody named is not run at all, or nothing.

    Args:
        subject: the device.
        scale: of the shapes.
        opened: what `subject.describe` says of it; None: it is not open yet.
    """
    if not subject.beside:
        return ""
    if scale == "full":
        return f"the published shapes take it hours; --device {subject.device} runs them, --scale small smaller ones"
    if opened is not None and scale != "tiny" and not _compiled(opened):
        return f"without a compiler only --scale tiny is quick; --device {subject.device} runs it"
    return ""


def passed_over(subject: Subject, opened: Mapping[str, Any], tasks: Sequence[Task]) -> dict[Task, Result]:
    """Return the rows of what a device that nobody named leaves out where no compiler is.

    float32, which is no matrix unit's, and of 16-bit dtypes all presets of a case but one.

    Args:
        subject: the device.
        opened: what `subject.describe` says of it.
        tasks: what it would run.
    """
    if not subject.beside or _compiled(opened):
        return {}
    first = {(task.case.name, task.params.dtype): task for task in reversed(tasks)}
    detail = f"without a compiler one preset is run, in 16 bits; --device {subject.device} runs all"
    return {
        task: result(task, Judgement(Status.SKIPPED, detail=detail), str(opened["info"]["id"]), subject.impl, 0.0)
        for task in tasks
        if task.params.dtype == "float32" or first[task.case.name, task.params.dtype] is not task
    }


def _compiled(opened: Mapping[str, Any]) -> bool:
    """Tell whether the products are computed by the compiled library of `hal_sim`."""
    return bool(opened["versions"].get("simulator") == "compiled")
