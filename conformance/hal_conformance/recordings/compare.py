# SPDX-License-Identifier: Apache-2.0
"""Judge recordings against the oracle and against each other. No device is needed, and torch is not imported."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from hal.contract import Contract
from hal_conformance.execution.judging import result
from hal_conformance.execution.plan import Catalogue, complete
from hal_conformance.execution.process import share_of_the_cores
from hal_conformance.pool import pool
from hal_conformance.recordings import bundle
from hal_conformance.recordings.agreement import MOST, Agreement, Held
from hal_conformance.recordings.grouping import Grouper, Grouping
from hal_conformance.recordings.packed import Packed, distance
from hal_conformance.recordings.recording import FACTS, Entry, Recording
from hal_conformance.recordings.rejudging import Rejudge
from hal_conformance.report.certificate import certificates
from hal_conformance.report.pair import Pair
from hal_conformance.report.report import Report
from hal_conformance.result import Result, judged_devices, verdict_status
from hal_conformance.text import plain
from hal_conformance.version import suite_version

if TYPE_CHECKING:
    from hal_conformance.execution.plan import Task

SCHEMA = "hal.comparison/1"

LABEL = 120
"""Characters of a label without a number: it must tell one card from another."""
FACT = 4000
"""Characters of a fact that are compared: names of kernels and paths of libraries may differ at their ends."""


@dataclass(frozen=True)
class Fact:
    """A line of the manifests that is not the same in all recordings; None where it is missing."""

    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Difference:
    """One output that two recordings do not agree on, bit by bit.

    Attributes:
        a, b: the recordings.
        share: of the elements that both hold, those that differ in a bit; 1 where shapes or dtypes differ.
        worst: largest absolute difference of these; None where shapes differ or one is not finite.
        margins: of the case in a and in b, of the bound that the contract of each gives: how far each is from the
            oracle in its worst element. None where the case uses no bound.
    """

    case: str
    dtype: str
    output: str
    a: str
    b: str
    share: float
    worst: float | None
    margins: tuple[float, float] | None
    detail: str = ""


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        report: each recording as a subject, judged against the oracle.
        facts: differences of the manifests.
        differences: outputs that differ from those of the first recording that has the case.
        compared, equal: outputs that at least two recordings have, and how many of these are bit-equal in all.
        partial: cases that only some of the recordings have.
        grouping: by the fact that was asked for; None: none was.
    """

    report: Report
    recordings: list[dict[str, Any]]
    facts: list[Fact]
    differences: list[Difference]
    compared: int = 0
    equal: int = 0
    partial: int = 0
    grouping: Grouping | None = None

    def unjudged(self) -> list[str]:
        """Return the labels of recordings of which no result says anything, or of which no element was judged here.

        Of elements that cannot be judged the recorder's verdict stands, which a forged recording has, too.
        """
        judged = set(judged_devices(self.report.results))
        empty = {entry["label"] for entry in self.recordings if entry["elements"] and not entry["elements_judged_here"]}
        return [entry["label"] for entry in self.recordings if entry["label"] not in judged - empty]

    def odd(self) -> list[str]:
        """Return the labels of recordings that are not like the others of their group, without a reason."""
        groups = () if self.grouping is None else self.grouping.groups.values()
        return [odd.recording for group in groups for odd in group.odd.values() if not odd.explained_by]

    def faults(self, *, strict: bool = False) -> list[str]:
        """Return what makes the exit status 1 beside red results, in words."""
        found = [f"{label} is not like the others of its group, and nothing says why" for label in self.odd()]
        found += [f"nothing of {label} could be judged" for label in self.unjudged()]
        if not found and strict and self.exit_status(strict=True) > self.exit_status():
            found.append("--strict allows nothing amber")
        return found

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 0 if every recording was judged and nothing is red (nor amber, if strict), otherwise 1.

        A recording of a dead device must not hide behind that of a good one, and an odd card not in a crowd.
        """
        colour = "green" if self.grouping is None else self.grouping.colour()
        if self.unjudged() or colour == "red" or (strict and colour == "amber"):
            return 1
        return verdict_status(self.report.results, strict=strict)

    def as_json(self) -> dict[str, object]:
        """Return the comparison in the form `hal.comparison/1`."""
        return {
            **self.report.as_json(),
            "schema": SCHEMA,
            "suite": suite_version(),
            "recordings": self.recordings,
            "grouping": None if self.grouping is None else self.grouping.as_json(),
            "differences": {
                "manifest": [{"name": fact.name, "values": list(fact.values)} for fact in self.facts],
                "outputs": [dict(vars(difference)) for difference in self.differences],
                "compared": self.compared,
                "equal": self.equal,
                "partial": self.partial,
            },
        }


def labels(recordings: Sequence[Recording]) -> list[str]:
    """Return a name for each recording: its device, and as much of the file's path as tells them apart.

    Files of one name are in different folders; a number tells apart what is left, such as a file that is given twice.
    """
    parts = [r.name.split("/") for r in recordings]
    names: list[str] = []
    for own, recording in zip(parts, recordings, strict=True):
        alike = [other for other in parts if other is not own and other != own]
        depth = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in alike)), len(own))
        names.append(_shortened(f"{recording.device}@{'/'.join(own[-depth:])}"))
    numbered = list(names)
    for i, name in enumerate(names):
        number = i + 1
        while names.count(name) > 1 and numbered[i] in [*names, *numbered[:i]]:
            numbered[i] = f"{name}#{number}"
            number += len(names)
    return numbered


def _shortened(label: str) -> str:
    """Return a label that is cut in its middle: names of files differ at their ends."""
    whole = plain(label, 4 * LABEL)
    return whole if len(whole) <= LABEL else f"{whole[:30]}...{whole[33 - LABEL :]}"


@dataclass
class Compared:
    """What was found of one task.

    Attributes:
        task: its place in the order of all.
        name: with its dtype.
        rows: a result for each recording that has it.
        judged: for each of these, how many elements were judged here, and of how many.
    """

    task: int
    name: str
    rows: dict[int, Result] = field(default_factory=dict)
    judged: dict[int, tuple[int, int]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    compared: int = 0
    equal: int = 0
    pairs: list[Pair] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """What is needed of each recording besides its entries; it can be sent to another process."""

    labels: tuple[str, ...]
    impls: tuple[str, ...]
    facts: tuple[Mapping[str, Any], ...]

    def compare(self, place: int, task: Task, entries: Mapping[int, Entry]) -> Compared:
        """Judge and compare what the recordings have of one task."""
        found = Compared(place, f"{task.name} {task.params.dtype}")
        rejudge = Rejudge(task)
        contracts = [Contract.from_json(facts["contract"]) for facts in self.facts]
        for index, entry in entries.items():
            judgement = rejudge(entry, contracts[index], facts=self.facts[index])
            found.rows[index] = result(task, judgement, self.labels[index], self.impls[index], 0.0)
            found.judged[index] = (rejudge.coverage.judged, rejudge.coverage.shown)
        if 1 < len(self.labels) <= MOST:
            agreement = Agreement(self.labels, contracts)
            for index, entry in entries.items():
                if entry.status is None:
                    held = {name: Held.of_packed(packed) for name, packed in entry.outputs.items()}
                    agreement.hold(index, task, held, found.rows[index])
            found.pairs = agreement.pairs()
        having = [index for index, entry in entries.items() if entry.status is None]
        for output in dict.fromkeys(key for index in having for key in entries[index].outputs):
            sharing = [index for index in having if output in entries[index].outputs]
            if len(sharing) < 2:
                continue
            reference = sharing[0]
            a = entries[reference].outputs[output]
            self._check(task, output, {index: entries[index].outputs[output] for index in sharing})
            differing = [i for i in sharing[1:] if entries[i].outputs[output].digest != a.digest]
            found.compared += 1
            found.equal += not differing
            for index in differing:
                share, worst, detail = distance(a, entries[index].outputs[output])
                one, other = found.rows[reference].margin, found.rows[index].margin
                margins = None if one is None or other is None else (one, other)
                found.differences.append(
                    Difference(
                        task.name, task.params.dtype, plain(output, 60), self.labels[reference], self.labels[index],
                        share, worst, margins, detail,
                    )
                )  # fmt: skip
        return found

    def _check(self, task: Task, output: str, packed: Mapping[int, Packed]) -> None:
        """Raise Unreadable if a digest says something else than what is held beside it."""
        first_of: dict[bytes, int] = {}
        reference = next(iter(packed))
        for index, own in packed.items():
            for other in {first_of.setdefault(own.digest, index), reference} - {index}:
                if own.contradicts(packed[other]):
                    raise bundle.Unreadable(
                        f"{self.labels[other]} and {self.labels[index]}: what they hold of {task.name} "
                        f"{plain(output, 60)} is {'other' if own.digest == packed[other].digest else 'the same'} "
                        "elements, and their digests say otherwise: one of the recordings was altered"
                    )


Work = list[tuple[int, "Task", dict[int, Entry]]]


def _compare_all(bench: Bench, work: Work) -> list[Compared]:
    return [bench.compare(place, task, entries) for place, task, entries in work]


def compare(
    recordings: Sequence[Recording],
    tick: Callable[[str], None] | None = None,
    *,
    group_by: str | None = None,
    processes: int = 1,
    catalogue: Catalogue | None = None,
) -> Comparison:
    """Judge recordings against the oracle and against each other.

    Args:
        recordings: at least one; all of one scale and seed.
        tick: called with each task that is done.
        group_by: a fact of the manifests, by which recordings are grouped to find the odd one out of each group.
        processes: how many compute. More than one are spawned, so that a script must be importable.
        catalogue: the cases of the suite that made them; None: this one's.

    Raises:
        Unreadable: they were made from different inputs, or none has the fact.
    """
    first = recordings[0].selection
    for other in recordings[1:]:
        ours, theirs = (first.scale, first.seed), (other.selection.scale, other.selection.seed)
        if ours != theirs:
            raise bundle.Unreadable(
                f"{other.name} has scale {theirs[0]} and seed {theirs[1]}, and {recordings[0].name} has scale "
                f"{ours[0]} and seed {ours[1]}: their inputs differ"
            )
    if len(recordings) > 1 and (alone := _with_nothing_in_common(recordings)) is not None:
        raise bundle.Unreadable(f"{alone.name} has no case in common with any other recording")
    started = time.monotonic()
    names = labels(recordings)
    facts = [_facts(recording) for recording in recordings]
    originals: dict[str, int] = {}
    copies = [i for i, r in enumerate(recordings) if originals.setdefault(r.sha256, i) != i]
    grouper = None if group_by is None else Grouper(group_by, facts, names, copies)
    report = Report(first.scale, first.seed, [_subject(r, n) for r, n in zip(recordings, names, strict=True)])
    report.notes += [
        f"{names[i]} is the same recording as {names[originals[recordings[i].sha256]]}, and has no vote in its group"
        for i in copies
    ]
    files: list[dict[str, Any]] = [
        {"file": r.name, "label": n, "sha256": r.sha256, "elements_judged_here": 0, "elements": 0}
        for r, n in zip(recordings, names, strict=True)
    ]
    found = Comparison(report, files, manifest_differences(facts), [])
    table: dict[Task, dict[int, Entry]] = {}
    for index, recording in enumerate(recordings):
        for entry in recording.entries:
            table.setdefault(entry.task, {})[index] = entry
    bench = Bench(tuple(names), tuple(r.impl for r in recordings), tuple(r.facts for r in recordings))
    work: Work = [(place, task, entries) for place, (task, entries) in enumerate(table.items())]
    done: list[Compared] = []
    for one in _spread(bench, work, processes):
        done.append(one)
        if tick:
            tick(one.name)
    for one in sorted(done, key=lambda c: c.task):
        _, _, entries = work[one.task]
        _take_in(one, found, len(recordings))
        if grouper is not None:
            grouper.add(one.name, entries)
    found.grouping = None if grouper is None else grouper.found
    report.certificates = certificates(report.results, complete(first, (catalogue or Catalogue()).all()))
    report.seconds = time.monotonic() - started
    return found


def _with_nothing_in_common(recordings: Sequence[Recording]) -> Recording | None:
    """Return a recording of which no other has any case, if there is one."""
    holders = Counter(task for recording in recordings for task in {entry.task for entry in recording.entries})
    return next((r for r in recordings if all(holders[entry.task] == 1 for entry in r.entries)), None)


def _take_in(one: Compared, found: Comparison, recordings: int) -> None:
    if found.report.agreement:
        for pair, more in zip(found.report.agreement, one.pairs, strict=True):
            pair += more
    else:
        found.report.agreement = one.pairs
    found.report.results += one.rows.values()
    found.differences += one.differences
    found.compared += one.compared
    found.equal += one.equal
    found.partial += len(one.rows) < recordings
    for index, (judged, shown) in one.judged.items():
        found.recordings[index]["elements_judged_here"] += judged
        found.recordings[index]["elements"] += shown


def _spread(bench: Bench, work: Work, processes: int) -> Iterator[Compared]:
    """Yield what is found of each task, in the order in which it is done."""
    # Neighbours have the same weights, which a process keeps (`kept.Kept`): a family's tasks of one preset together,
    # and of these the dtypes of one case, which round the same numbers.
    parts = [
        sorted(part, key=lambda item: item[1].case.name)
        for _, part in itertools.groupby(work, lambda item: (item[1].case.family, item[1].params.preset))
    ]
    if processes == 1:
        for place, task, entries in itertools.chain.from_iterable(parts):
            yield bench.compare(place, task, entries)
        return
    with pool(processes, _share_the_cores, processes) as judges:
        for part in judges.map(_compare_all, itertools.repeat(bench), parts):
            yield from part


def _share_the_cores(processes: int) -> None:
    threadpool_limits(share_of_the_cores(processes), user_api="blas")


def manifest_differences(facts: Sequence[Mapping[str, str]]) -> list[Fact]:
    """Return what the manifests do not agree on: versions, driver, flags, environment, contract."""
    names = dict.fromkeys(name for flat in facts for name in flat)
    rows = [Fact(plain(name, 80), tuple(flat.get(name) for flat in facts)) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _facts(recording: Recording) -> dict[str, str]:
    """Return the lines of a manifest by dotted name."""
    return _flatten({**{name: recording.facts[name] for name in FACTS}, "impl": recording.impl})


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: plain(value, FACT)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        # Cut at each level: a forged manifest may have a long name over thousands of others.
        found.update(_flatten(inner, plain(f"{prefix}.{key}" if prefix else key, 200)))
    return found


def _subject(recording: Recording, label: str) -> dict[str, Any]:
    return {"id": label, "impl": recording.impl, **recording.facts}
