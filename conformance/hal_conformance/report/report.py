# SPDX-License-Identifier: Apache-2.0
"""Everything that a run found: subjects, results, what was not run; its JSON form and its exit status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hal_conformance.report.certificate import Certificate
from hal_conformance.report.pair import Pair
from hal_conformance.result import Result, summary, verdict_status
from hal_conformance.version import suite_version

SCHEMA = "hal.conformance/1"


@dataclass(frozen=True)
class NotRun:
    """A subject that gave no results.

    Attributes:
        subject: the device, and the implementation if it is not the portable one.
        kind: absent, broken, unknown, or left out.
        failed: whether it was named or required, so that the run fails for it.
    """

    subject: str
    kind: str
    reason: str
    failed: bool

    def as_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        return dict(vars(self))


@dataclass
class Report:
    """Everything that a run found.

    Attributes:
        subjects: for each that ran: id, impl, info, contract and versions, as JSON values.
        required_missing: globs of `--require` that no judged device answers to.
        notes: decisions that the reader should know.
        certificates: what the results certify, for each subject and dtype.
        agreement: every pair of subjects, and how far they are from each other.
    """

    scale: str
    seed: int
    subjects: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    required_missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)
    agreement: list[Pair] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, object]:
        """Return the report in the form `hal.conformance/1`."""
        return {
            "schema": SCHEMA,
            "suite": suite_version(),
            "seed": self.seed,
            "scale": self.scale,
            "subjects": self.subjects,
            "results": [row.as_json() for row in self.results],
            "summary": summary(self.results),
            "not_run": [entry.as_json() for entry in self.not_run],
            "required_missing": self.required_missing,
            "notes": self.notes,
            "certificates": [found.as_json() for found in self.certificates],
            "agreement": [pair.as_json() for pair in self.agreement],
            "seconds": round(self.seconds, 3),
        }

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 3 if a named or required device is missing, 1 for any red or nothing judged, otherwise 0.

        With `strict`, amber counts as red.
        """
        if self.required_missing or any(entry.failed for entry in self.not_run):
            return 3
        return verdict_status(self.results, strict=strict)
