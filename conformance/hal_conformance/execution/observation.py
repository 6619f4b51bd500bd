# SPDX-License-Identifier: Apache-2.0
"""What a subject did with one task, before anybody judges it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hal_conformance.execution.plan import Task
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal_conformance.case import Arrays


@dataclass(frozen=True)
class Observation:
    """What a subject did with one task.

    Attributes:
        status: a verdict that needs no judge, or None: then the outputs are to be judged.
        hashes: SHA-256 of each input, as the worker had it.
        seconds: that the case ran.
    """

    task: Task
    status: Status | None
    detail: str = ""
    outputs: Arrays = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
