# SPDX-License-Identifier: Apache-2.0
"""Recordings of cards that should be alike, and the odd one out.

A task that is deterministic gives one digest a card. So within a group of recordings that share a fact (a driver, a
device's name, a host) more than half have the same digests of all outputs, and the others are named; so is one that
has no outputs where more than half have them. Without such a majority, either all differ from each other, and the task
is not deterministic there; or there are two that differ, or parts within which all agree: then any may be wrong, and
nobody is named.

An odd one is red if nothing in its manifest explains it. Which card it is (index, memory, host, the variables that
choose one) and where files lie explains nothing; anything else that all of the majority share and it does not (a
version, a flag, a variable) is more likely the reason than a broken card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.packed import distance
from hal_conformance.text import plain
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal_conformance.recordings.recording import Entry

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
        "info.id", "info.torch_device", "info.total_memory", "info.evidence", "versions.host", "versions.uuid",
        *(f"environment.{name}" for name in _CHOOSES),
    }
)  # fmt: skip
"""Facts that say which card it is, and explain no number; see `is_identity`."""
_PLACES = ("_HOME", "_DIR", "_PATH", "_ROOT", "_CACHE", "_IFNAME")
"""Endings of variables that say where something lies."""
MISSING = "(not there)"


@dataclass
class Odd:
    """A recording whose bits are not those of the others of its group.

    Attributes:
        recording: its label.
        others: how many recordings agree with each other in `first`.
        tasks: in how many tasks it is alone, or with fewer than half.
        first: the first of them, with the output that differs and how.
        explained_by: facts that may be the reason in all of these tasks; empty: the manifest explains nothing.
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
        alike: those of which all digests are equal.
        open: those without a majority, in which each has bits of its own: not deterministic.
        split: those without a majority in which some agree, or of which only two have outputs: either may be wrong.
        odd: by index of the recording.
    """

    value: str
    recordings: list[str]
    compared: int = 0
    alike: int = 0
    open: int = 0
    split: int = 0
    first_open: str = ""
    first_split: str = ""
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
        """Return red if an odd one is left unexplained, amber if there is any, or a task that is split; else green."""
        odd = [found for group in self.groups.values() for found in group.odd.values()]
        if any(not found.explained_by for found in odd):
            return "red"
        return "amber" if odd or any(group.split for group in self.groups.values()) else "green"

    def as_json(self) -> dict[str, Any]:
        """Return the grouping as plain JSON values."""
        return {
            "fact": self.fact, "colour": self.colour(), "groups": [group.as_json() for group in self.groups.values()],
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
            known = sorted(
                {fact for flat in facts for fact in flat}, key=lambda fact: (not fact.startswith("versions."), fact)
            )
            raise Unreadable(
                f"no recording says {plain(name, 60)}; they say {plain(', '.join([*ALIASES, *known]), 600)}"
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
        # A host without memory for a task has said nothing about the card.
        having = {i: entry for i, entry in entries.items()
                  if entry.status is not Status.SKIPPED and i not in self._copies}  # fmt: skip
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
            differing = [index for index in others if _bits(having[index]) != _bits(having[first])]
            self.found.alike += not differing
            if differing and not self.found.first:
                what = _difference(having[first], having[differing[0]])
                self.found.first = f"{task}: {what} ({self._labels[first]}, {self._labels[differing[0]]})"

    def _within(self, task: str, group: Group, members: Mapping[int, Entry]) -> int | None:
        """Compare the members of a group; return one that most of them agree with, if there is one."""
        bits = {index: _bits(entry) for index, entry in members.items()}
        common, votes = Counter(bits.values()).most_common(1)[0]
        leader = next(index for index, own in bits.items() if own == common)
        if len(members) < 2:
            return leader if members[leader].status is None else None
        if 2 * votes > len(members) and members[leader].status is not None:
            return None  # most have no outputs: it is no oddity to have some
        group.compared += 1
        if votes == len(members):
            group.alike += 1
            return leader
        if 2 * votes <= len(members):
            other = next(index for index, own in bits.items() if own != common)
            what = f"{task}: {_difference(members[leader], members[other])}"
            if votes > 1 or len(members) == 2:
                group.split += 1
                group.first_split = group.first_split or what
            else:
                group.open += 1
                group.first_open = group.first_open or what
            return None
        most = [index for index, own in bits.items() if own == common]
        for index, own in bits.items():
            if own != common:
                reasons = self._explained(index, most)
                if index not in group.odd:
                    what = f"{task}: {_difference(members[leader], members[index])}"
                    group.odd[index] = Odd(self._labels[index], votes, what, reasons)
                found = group.odd[index]
                found.tasks += 1
                # A driver that explains one task explains no other in which cards of that driver are like the rest.
                found.explained_by = [reason for reason in found.explained_by if reason in reasons]
        return leader

    def _explained(self, index: int, most: Sequence[int]) -> list[str]:
        """Return the facts whose value none of the majority shares, and that are not another one for each card."""
        found = []
        for name in dict.fromkeys(fact for other in (*most, index) for fact in self._facts[other]):
            values = {self._facts[other].get(name, MISSING) for other in most}
            own = self._facts[index].get(name, MISSING)
            if not is_identity(name) and own not in values and len(values) < max(2, len(most)):
                others = " or ".join(plain(value, 60) for value in sorted(values)[:3])
                found.append(f"{plain(name, 60)} is {plain(own, 60)}, elsewhere {others}")
        return found


def is_identity(fact: str) -> bool:
    """Tell whether a fact only says which card of several it is, as `CUDA_VISIBLE_DEVICES` does, or where files lie."""
    if not fact.startswith("environment."):
        return fact in IDENTITY
    of_this_suite = fact.startswith("environment.HAL_CONFORMANCE_")
    return fact in IDENTITY or of_this_suite or fact.endswith(("_VISIBLE_DEVICES", "_RANK", *_PLACES))


def _bits(entry: Entry) -> tuple[tuple[str, bytes], ...]:
    """Return the digests of all outputs; of an entry without, its status."""
    if entry.status is not None:
        return ((entry.status.value, b""),)
    return tuple(sorted((name, packed.digest) for name, packed in entry.outputs.items()))


def _difference(a: Entry, b: Entry) -> str:
    """Return the first output that differs, and how."""
    for one, where in ((b, ""), (a, "elsewhere ")):
        if one.status is not None:
            return f"{where}{one.status.value}" + (f" ({plain(one.detail, 120)})" if one.detail else "")
    for name, packed in a.outputs.items():
        other = b.outputs.get(name)
        if other is None:
            return f"no output {plain(name, 60)}"
        if other.digest != packed.digest:
            return f"{plain(name, 60)}, {distance(packed, other)[2] or 'other bits'}"
    return "other outputs"
