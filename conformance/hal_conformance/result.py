# SPDX-License-Identifier: Apache-2.0
"""The verdict on one case, on one subject, in one dtype; and what many of them amount to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hal_conformance.verdicts import Status

DETECTORS = ("bound", "rms", "bias", "exact")


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
