# SPDX-License-Identifier: Apache-2.0
"""What a run found: result rows, subjects, what was not run; its JSON form and its exit status."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hal_conformance.certificate import Certificate
from hal_conformance.pair import Pair
from hal_conformance.verdicts import Status

SCHEMA = "hal.conformance/1"

SUITE_REVISION = 6
"""Counts changes of cases, inputs or recorded outputs; recordings of different suites cannot be compared."""

DETECTORS = ("bound", "rms", "bias", "exact")


def suite_version() -> str:
    """Return the version of this suite: the package's, and the revision of its cases."""
    import hal

    return f"{hal.__version__}+suite.{SUITE_REVISION}"


@dataclass(frozen=True)
class Result:
    """The verdict on one case, on one subject, in one dtype; the fields are those of the JSON row.

    Attributes:
        case: name with preset, such as `router.topk_set[mixtral-8x7b]`.
        margin: largest error over its bound; None where there is none, or where it is not finite.
        seconds: that the case ran on the subject.
    """

    case: str
    family: str
    subject: str
    impl: str
    dtype: str
    status: Status
    margin: float | None
    detectors: Mapping[str, float | None]
    detail: str
    seconds: float

    def as_json(self) -> dict[str, object]:
        """Return the row as plain JSON values."""
        return {**vars(self), "status": self.status.value, "detectors": dict(self.detectors)}


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


def verdict_status(results: Iterable[Result], *, strict: bool = False) -> int:
    """Return 0 if something was judged and nothing is red (nor amber, if strict), otherwise 1."""
    colours = Counter(row.status.colour for row in results)
    failed = colours["red"] or (strict and colours["amber"])
    judged = colours["green"] + colours["amber"] + colours["red"]
    return 0 if judged and not failed else 1


def summary(results: Iterable[Result]) -> dict[str, int]:
    """Return the number of results of each status that occurs, mildest first."""
    counts = Counter(row.status for row in results)
    return {status.value: counts[status] for status in Status if counts[status]}


def judged_devices(results: Sequence[Result]) -> list[str]:
    """Return the devices of which at least one result says something, green, amber or red."""
    return list(dict.fromkeys(row.subject for row in results if row.status.colour != "neutral"))


def to_json(document: object) -> bytes:
    """Return JSON text that every parser accepts: ASCII, and no NaN or infinity.

    Raises:
        ValueError: a number is not finite.
    """
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
