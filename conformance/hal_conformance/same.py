# SPDX-License-Identifier: Apache-2.0
"""Cases that cannot differ between the CPU and a device of which only the matrix unit is simulated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hal_conformance.results import DETECTORS
from hal_conformance.subject import PORTABLE
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal_conformance.plan import Task
    from hal_conformance.results import Result


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
        for task, row in on_cpu.items() if not task.case.multiplies
    }  # fmt: skip


def as_on_cpu(rows: Iterable[Result]) -> list[Result]:
    """Return results with the CPU's verdict in place of the remark that it is the same."""
    found = list(rows)
    of = {(r.case, r.dtype): r for r in found if (r.subject, r.impl) == ("cpu", PORTABLE)}
    return [
        replace(of[row.case, row.dtype], subject=row.subject) if row.status is Status.SAME_AS_CPU else row
        for row in found
    ]
