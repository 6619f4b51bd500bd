# SPDX-License-Identifier: Apache-2.0
"""Recordings of cards that should be alike, and the odd one out.

A task that is deterministic gives one digest a card. So within a group of recordings that share a fact (a driver, a
device's name, a host) more than half have the same digests of all outputs, or the task is not deterministic there.
The others of the group are named. Two that differ are shown, and nobody is named: either may be the odd one.

An odd one is red if nothing in its manifest explains it: the device's index, its memory, the host and the variables
that choose a card are who it is, and anything else that it has to itself (a version, a flag, a variable) is more likely
the reason than a broken card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hal_conformance.bundle import Unreadable
from hal_conformance.packed import distance
from hal_conformance.text import plain

if TYPE_CHECKING:
    from hal_conformance.recording import Entry

ALIASES: Mapping[str, str] = {
    "driver": "versions.driver", "device": "info.name", "name": "info.name", "host": "versions.host",
    "arch": "info.arch", "torch": "versions.torch",
}  # fmt: skip
_CHOOSES = (
    "HOSTNAME", "HAL_DEVICE", "GPU_DEVICE_ORDINAL", "CUDA_DEVICE", "CUDA_DEVICE_ORDER", "HIP_DEVICE", "DEVICE_ID",
    "ASCEND_DEVICE_ID", "RANK_ID", "RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "MASTER_ADDR",
    "MASTER_PORT", "NCCL_HOSTID", "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR",
)  # fmt: skip
"""Variables by which a launcher or a person gives a process its card."""
IDENTITY = frozenset(
    {
        "info.id", "info.index", "info.torch_device", "info.total_memory", "info.evidence", "versions.host",
        *(f"environment.{name}" for name in _CHOOSES),
    }
)  # fmt: skip
"""Facts that say which card it is, and explain no number; see `is_identity`."""
MISSING = "(not there)"


@dataclass
class Odd:
    """A recording whose bits are not those of the others of its group.

    Attributes:
        recording: its label.
        others: how many recordings agree with each other in the first of these tasks.
        tasks: in how many tasks it is alone, or with fewer than half.
        first: the first of them, with the output that differs and how.
        explained_by: facts that only it has; empty: the manifest explains nothing.
    """

    recording: str
    others: int
    first: str
    explained_by: list[str]
    tasks: int = 0


@dataclass
class Group:
    """Recordings that share a fact.

    Attributes:
        value: of the fact.
        recordings: their labels.
        compared: tasks that at least two of them have.
        alike: those of which all digests are equal, and everything else that every recording holds.
        open: those without a majority: not deterministic, or two that differ.
        odd: by index of the recording.
    """

    value: str
    recordings: list[str]
    compared: int = 0
    alike: int = 0
    open: int = 0
    first_open: str = ""
    odd: dict[int, Odd] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the group as plain JSON values."""
        odd = [vars(found) for found in self.odd.values()]
        return {**{name: value for name, value in vars(self).items() if name != "odd"}, "odd": odd}


@dataclass
class Grouping:
    """Recordings grouped by a fact.

    Attributes:
        fact: the name of the fact.
        groups: by its value.
        compared: tasks that at least two groups have, each with a majority of its own.
        alike: those in which all groups have the same bits.
        first: the first of the others.
    """

    fact: str
    groups: dict[str, Group]
    compared: int = 0
    alike: int = 0
    first: str = ""

    def colour(self) -> str:
        """Return red if an odd one is left unexplained, amber if there is any, or two that differ; else green."""
        odd = [found for group in self.groups.values() for found in group.odd.values()]
        if any(not found.explained_by for found in odd):
            return "red"
        pairs = any(group.open and len(group.recordings) == 2 for group in self.groups.values())
        return "amber" if odd or pairs else "green"

    def as_json(self) -> dict[str, Any]:
        """Return the grouping as plain JSON values."""
        return {
            "fact": self.fact, "groups": [group.as_json() for group in self.groups.values()],
            "compared": self.compared, "alike": self.alike, "first": self.first,
        }  # fmt: skip


class Grouper:
    """Groups recordings, and takes in one task after the other.

    Args:
        by: a fact: the name of a line of the manifest such as `versions.torch`, or one of `ALIASES`.
        facts: of each recording, flat.
        labels: of each recording.
        copies: which of them, by index, are another one's file again: a card has one vote.

    Raises:
        Unreadable: no recording has that fact, and it is none of `ALIASES`.
    """

    def __init__(
        self, by: str, facts: Sequence[Mapping[str, str]], labels: Sequence[str], copies: Collection[int] = ()
    ) -> None:
        name = ALIASES.get(by, by)
        # A processor has no driver: then all are of one group.
        if name not in ALIASES.values() and not any(name in flat for flat in facts):
            known = sorted({fact for flat in facts for fact in flat})
            raise Unreadable(
                f"no recording says {plain(name, 60)}; they say {plain(', '.join([*ALIASES, *known]), 300)}"
            )
        self._labels = labels
        self._facts = facts
        self._values = [flat.get(name, MISSING) for flat in facts]
        self._copies = frozenset(copies)
        groups = {value: Group(value, []) for value in dict.fromkeys(self._values)}
        for index, (value, label) in enumerate(zip(self._values, labels, strict=True)):
            if index not in self._copies:
                groups[value].recordings.append(label)
        self.found = Grouping(name, groups)

    def add(self, task: str, entries: Mapping[int, Entry]) -> None:
        """Take in what the recordings have of a task.

        Args:
            task: name and dtype.
            entries: by index of the recording.
        """
        having = {i: entry for i, entry in entries.items() if entry.status is None and i not in self._copies}
        leaders: dict[str, int] = {}
        for value, group in self.found.groups.items():
            members = [index for index in having if self._values[index] == value]
            if members:
                leader = self._within(task, group, {index: having[index] for index in members})
                if leader is not None:
                    leaders[value] = leader
        if len(leaders) > 1:
            self.found.compared += 1
            first, *others = leaders.values()
            differing = [index for index in others if _digests(having[index]) != _digests(having[first])]
            self.found.alike += not differing
            if differing and not self.found.first:
                what = _difference(having[first], having[differing[0]])
                self.found.first = f"{task}: {what} ({self._labels[first]}, {self._labels[differing[0]]})"

    def _within(self, task: str, group: Group, members: Mapping[int, Entry]) -> int | None:
        """Compare the members of a group; return one that most of them agree with, if there is one."""
        digests = {index: _digests(entry) for index, entry in members.items()}
        common, votes = Counter(digests.values()).most_common(1)[0]
        leader = next(index for index, own in digests.items() if own == common)
        if len(members) < 2:
            return leader
        group.compared += 1
        if votes == len(members):
            group.alike += 1
            return leader
        if 2 * votes <= len(members):
            group.open += 1
            other = next(index for index, own in digests.items() if own != common)
            group.first_open = group.first_open or f"{task}: {_difference(members[leader], members[other])}"
            return None
        for index, own in digests.items():
            if own != common:
                if index not in group.odd:
                    what = f"{task}: {_difference(members[leader], members[index])}"
                    group.odd[index] = Odd(self._labels[index], votes, what, self._alone(index, members))
                group.odd[index].tasks += 1
        return leader

    def _alone(self, index: int, members: Mapping[int, Entry]) -> list[str]:
        """Return the facts that the others share and this one has not."""
        found = []
        for name in dict.fromkeys(fact for other in members for fact in self._facts[other]):
            values = {self._facts[other].get(name, MISSING) for other in members if other != index}
            own = self._facts[index].get(name, MISSING)
            if not is_identity(name) and own not in values and len(values) == 1:
                found.append(f"{plain(name, 60)} is {plain(own, 60)}, elsewhere {plain(values.pop(), 60)}")
        return found


def is_identity(fact: str) -> bool:
    """Tell whether a fact only says which card of several it is, as `CUDA_VISIBLE_DEVICES` and its like do."""
    return fact in IDENTITY or (fact.startswith("environment.") and fact.endswith(("_VISIBLE_DEVICES", "_RANK")))


def _digests(entry: Entry) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((name, packed.digest) for name, packed in entry.outputs.items()))


def _difference(a: Entry, b: Entry) -> str:
    """Return the first output that differs, and how."""
    for name, packed in a.outputs.items():
        other = b.outputs.get(name)
        if other is None:
            return f"no output {plain(name, 60)}"
        if other.digest != packed.digest:
            return f"{plain(name, 60)}, {distance(packed, other)[2] or 'other bits'}"
    return "other outputs"
