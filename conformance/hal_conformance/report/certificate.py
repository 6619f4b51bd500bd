# SPDX-License-Identifier: Apache-2.0
"""What a run certifies, level by level, for each subject and dtype under its contract.

L0  what is judged bit by bit       L3  collectives and expert parallelism (no family of this suite yet)
L1  every operator                  L4  trajectories
L2  a layer, forward and backward

A level holds if everything that belongs to it was judged and is green; it is open where something is amber, was not
judged, or was left out of the run; it fails with the first red.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hal_conformance.result import Result

LEVELS: Mapping[str, str] = {
    "L0": "bit by bit",
    "L1": "operators",
    "L2": "layer",
    "L3": "collectives",
    "L4": "trajectories",
}
_ABOVE = {"layer": "L2", "determinism": "L2", "trajectory": "L4"}
"""Families above the operators'."""


@dataclass(frozen=True)
class Level:
    """The state of one level: held, open or failed.

    Attributes:
        results: that belong to it.
        why: what keeps it from being held.
    """

    name: str
    state: str
    results: int
    why: str = ""


@dataclass(frozen=True)
class Certificate:
    """The levels of one subject in one dtype."""

    subject: str
    impl: str
    dtype: str
    levels: tuple[Level, ...]

    @property
    def reached(self) -> str | None:
        """The highest level that holds with all below it, or None."""
        best = None
        for level in self.levels:
            if level.state != "held":
                break
            best = level.name
        return best

    def as_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        levels = [dict(vars(level)) for level in self.levels]
        return {
            "subject": self.subject, "impl": self.impl, "dtype": self.dtype, "reached": self.reached, "levels": levels,
        }  # fmt: skip

    def sentence(self) -> str:
        """Return it in one line: levels that share a state together, with what keeps each from being held."""
        parts: list[str] = []
        for level in self.levels:
            words = f"{level.name} {level.state}" + (f": {level.why}" if level.why else "")
            if parts and level.state == "held" and parts[-1].endswith(" held"):
                parts[-1] = f"{parts[-1].removesuffix(' held')} {words}"
            else:
                parts.append(words)
        return "; ".join(parts)


def certificates(rows: Sequence[Result], planned: Mapping[str, Iterable[tuple[str, str]]]) -> list[Certificate]:
    """Return the certificates that a run's results give.

    Args:
        rows: of every subject.
        planned: for each dtype, the (result name, family) pairs that a complete run at this scale has.
    """
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        groups.setdefault((row.subject, row.impl, row.dtype), []).append(row)
    return [
        Certificate(*key, tuple(_level(name, found, list(planned.get(key[2], ()))) for name in LEVELS))
        for key, found in groups.items()
    ]


def _level(name: str, rows: Sequence[Result], planned: Sequence[tuple[str, str]]) -> Level:
    if name == "L0":
        # Judged bit by bit and by nothing else: which cases these are, only their results tell.
        mine = [r for r in rows if r.detectors.get("exact") is not None and r.detectors.get("bound") is None]
        missing = len(planned) - len(rows) if mine else len(planned)
    else:
        mine = [r for r in rows if _of(r.family) == name]
        missing = len({case for case, family in planned if _of(family) == name} - {r.case for r in mine})
    if name == "L3":
        return Level(name, "open", 0, "not part of this suite")
    if not mine and not missing:
        return Level(name, "open", 0, "no case in this dtype")
    red = [r for r in mine if r.status.colour == "red"]
    if red:
        return Level(name, "failed", len(mine), f"{red[0].case}{_more(red)}")
    amber = [r for r in mine if r.status.colour == "amber"]
    neutral = [r for r in mine if r.status.colour == "neutral"]
    reasons = [
        *([f"{amber[0].case}{_more(amber)} amber"] if amber else []),
        *([f"{len(neutral)} not judged"] if neutral else []),
        *([f"{missing} not run"] if missing > 0 else []),
    ]
    return Level(name, "open" if reasons or not mine else "held", len(mine), ", ".join(reasons))


def _of(family: str) -> str:
    return _ABOVE.get(family, "L1")


def _more(rows: Sequence[Result]) -> str:
    return f" and {len(rows) - 1} more" if len(rows) > 1 else ""
