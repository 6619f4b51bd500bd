# SPDX-License-Identifier: Apache-2.0
"""Results counted by family and dtype, and the sentence that a person in a hurry reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal_conformance.report.report import Report
    from hal_conformance.result import Result


@dataclass(frozen=True)
class Tally:
    """The results of one family in one dtype."""

    family: str
    dtype: str
    rows: tuple[Result, ...]

    def count(self, *statuses: Status) -> int:
        """Return how many results have one of these statuses."""
        return sum(row.status in statuses for row in self.rows)

    def colour(self, colour: str) -> int:
        """Return how many results of its own have this colour."""
        return sum(row.status.colour == colour for row in self.rows if row.status is not Status.SAME_AS_CPU)

    @property
    def margin(self) -> float | None:
        """Largest margin, or None where no bound was used."""
        return max((row.margin for row in self.rows if row.margin is not None), default=None)

    @property
    def seconds(self) -> float:
        """Sum over the results."""
        return sum(row.seconds for row in self.rows)


def tally(rows: Iterable[Result]) -> list[Tally]:
    """Group by family and dtype, in the order in which they first occur."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for row in rows:
        groups.setdefault(row.family, {}).setdefault(row.dtype, []).append(row)
    return [Tally(f, d, tuple(found)) for f, dtypes in groups.items() for d, found in dtypes.items()]


def notable(rows: Iterable[Result]) -> list[Result]:
    """Return what is not green, the most severe first, but for what is the same as on the CPU."""
    found = [row for row in rows if row.status.colour != "green" and row.status is not Status.SAME_AS_CPU]
    return sorted(found, key=lambda row: {"red": 0, "amber": 1, "neutral": 2}[row.status.colour])


def verdict(
    rows: Sequence[Result], missing: int, seconds: float, *, faults: Sequence[str] = (), amber: bool = False
) -> str:
    """Return the sentence under the table: how much was judged, what came out, and what that means.

    Args:
        rows: the results.
        missing: how many named or required devices gave none.
        seconds: that it took.
        faults: what fails beside the results, in words.
        amber: whether something beside the results needs a look.
    """
    own = [row for row in rows if row.status is not Status.SAME_AS_CPU]
    colours = {c: sum(row.status.colour == c for row in own) for c in ("green", "amber", "red", "neutral")}
    parts = [f"{n} {'not judged' if c == 'neutral' else c}" for c, n in colours.items() if n]
    counted = ", ".join([*parts, *([f"{len(rows) - len(own)} same as cpu"] if len(own) < len(rows) else [])])
    judged = len(own) - colours["neutral"]
    beside = f"{faults[0]}{f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''}" if faults else ""
    if not judged:
        meaning = "NOTHING WAS JUDGED"
    elif colours["red"]:
        meaning = "DOES NOT AGREE with the float64 oracle" + (f"; {beside}" if faults else "")
    elif faults:
        meaning = f"FAILS: {beside}"
    elif any(row.status is Status.KNOWN for row in rows):
        meaning = "agrees but for known faults; look at what is amber"
    elif colours["amber"] or amber:
        meaning = "agrees within every bound; look at what is amber"
    else:
        meaning = "agrees with the float64 oracle within every derived bound"
    absent = f"; {missing} named or required device{'s' * (missing != 1)} MISSING" if missing else ""
    return f"verdict: {meaning}{absent} ({counted or 'no results'}; {seconds:.1f} s)"


def missing_devices(report: Report) -> int:
    """Return how many named or required devices gave no results."""
    return len(report.required_missing) + sum(entry.failed for entry in report.not_run)
