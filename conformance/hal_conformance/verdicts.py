# SPDX-License-Identifier: Apache-2.0
"""What the suite can say about one case on one subject, from exact agreement to a wrong result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Literal

Colour = Literal["green", "amber", "red", "neutral"]


class Status(str, Enum):
    """One verdict. The order of the members is the order of severity, mildest first."""

    EXACT = "EXACT"  # bitwise equal
    PASS = "PASS"  # within every bound
    PASS_AMBIGUOUS = "PASS-AMBIGUOUS"  # as PASS; where the choice differs, the margin left it open
    SAME_AS_CPU = "SAME-AS-CPU"  # cannot differ from the CPU, where it was judged
    UNSUPPORTED = "UNSUPPORTED"  # the subject says that it cannot
    SKIPPED = "SKIPPED"  # not tried, with a reason
    KNOWN = "KNOWN"  # a documented fault of somebody else's
    INCONCLUSIVE = "INCONCLUSIVE"  # the statistics cannot tell
    NONDET = "NONDET"  # differs from run to run, each run within its bounds
    DEGRADED = "DEGRADED"  # within the bounds, but less precise than the contract promises
    FAIL_NUMERIC = "FAIL-NUMERIC"  # outside a bound
    FAIL_DISCRETE = "FAIL-DISCRETE"  # a wrong expert, count, row or order
    FAIL_NONFINITE = "FAIL-NONFINITE"  # NaN or infinity where the oracle has a number, or the reverse
    FAIL_STRUCTURE = "FAIL-STRUCTURE"  # wrong keys, shapes or dtypes, an input written into, a process left changed
    HANG = "HANG"
    CRASH = "CRASH"
    INVALID = "INVALID"  # not comparable, or not a status that this suite knows

    @property
    def colour(self) -> Colour:
        """Green counts as agreement, red as a fault; amber needs a look; neutral says nothing either way."""
        return _COLOURS.get(self, "red")

    @classmethod
    def parse(cls, text: object) -> Status:
        """Read a status; whatever this suite does not know is INVALID."""
        return next((status for status in cls if status.value == text), cls.INVALID)

    @property
    def severity(self) -> int:
        """Position in the order of severity; larger is worse."""
        return list(type(self)).index(self)


_COLOURS: Mapping[Status, Colour] = MappingProxyType(
    {
        Status.EXACT: "green",
        Status.PASS: "green",
        Status.PASS_AMBIGUOUS: "green",
        Status.SAME_AS_CPU: "neutral",
        Status.UNSUPPORTED: "neutral",
        Status.SKIPPED: "neutral",
        Status.KNOWN: "amber",
        Status.INCONCLUSIVE: "amber",
        Status.NONDET: "amber",
        Status.DEGRADED: "amber",
    }
)


def worst(statuses: Iterable[Status]) -> Status:
    """Return the most severe status; INVALID if there is none, since nothing was judged."""
    return max(statuses, key=lambda status: status.severity, default=Status.INVALID)


@dataclass(frozen=True)
class Judgement:
    """The verdict on one case.

    Attributes:
        status: the verdict.
        margin: largest error over its bound (above 1 fails), or None where no bound was used.
        detectors: what each detector measured, None where it was not used. `bound`: the largest error over its
            bound. `rms`: the root mean square of error over standard deviation, divided by its threshold, so that
            above 1 is caught. `bias`: the z value, divided by its threshold. `exact`: the share of elements that
            differ in a bit.
        detail: one line; for a failure, the worst rows, tokens or experts.
    """

    status: Status
    margin: float | None = None
    detectors: Mapping[str, float | None] = field(
        default_factory=lambda: {"bound": None, "rms": None, "bias": None, "exact": None}
    )
    detail: str = ""
