# SPDX-License-Identifier: Apache-2.0
"""Judge recordings against the oracle and against each other. No device is needed, and torch is not imported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal_conformance import bundle
from hal_conformance.judging import judge_outputs, result
from hal_conformance.recording import FACTS, Entry, Recording
from hal_conformance.results import Report, judged_devices, suite_version, verdict_status
from hal_conformance.text import plain
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.case import Array, Arrays
    from hal_conformance.plan import Task

SCHEMA = "hal.comparison/1"


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
        share: of the elements, that differ in a bit; 1 where shapes or dtypes differ.
        worst: largest absolute difference; None where shapes differ or one is not finite.
        bounds: the difference is at most this many of the case's bounds (the sum of both margins, since each
            is within its margin of the oracle); None where the case uses no bound.
    """

    case: str
    dtype: str
    output: str
    a: str
    b: str
    share: float
    worst: float | None
    bounds: float | None
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
    """

    report: Report
    recordings: list[dict[str, Any]]
    facts: list[Fact]
    differences: list[Difference]
    compared: int = 0
    equal: int = 0
    partial: int = 0

    def unjudged(self) -> list[str]:
        """Return the labels of recordings of which no result says anything."""
        judged = set(judged_devices(self.report.results))
        return [entry["label"] for entry in self.recordings if entry["label"] not in judged]

    def exit_status(self, *, strict: bool = False) -> int:
        """Return 0 if every recording was judged and nothing is red (nor amber, if strict), otherwise 1.

        A recording of a dead device must not hide behind that of a good one.
        """
        return 1 if self.unjudged() else verdict_status(self.report.results, strict=strict)

    def as_json(self) -> dict[str, object]:
        """Return the comparison in the form `hal.comparison/1`."""
        return {
            **self.report.as_json(),
            "schema": SCHEMA,
            "suite": suite_version(),
            "recordings": self.recordings,
            "differences": {
                "manifest": [{"name": fact.name, "values": list(fact.values)} for fact in self.facts],
                "outputs": [dict(vars(difference)) for difference in self.differences],
                "compared": self.compared,
                "equal": self.equal,
                "partial": self.partial,
            },
        }


def labels(recordings: Sequence[Recording]) -> list[str]:
    """Return a name for each recording: its device and file, with a number where that is not unique."""
    names = [plain(f"{r.device}@{r.name}", 120) for r in recordings]
    return [f"{n}#{i + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def compare(recordings: Sequence[Recording], tick: Callable[[Task], None] | None = None) -> Comparison:
    """Judge recordings against the oracle and against each other.

    Args:
        recordings: at least one; all of one scale and seed.
        tick: called with each task that is done.

    Raises:
        Unreadable: they were made from different inputs.
    """
    first = recordings[0].selection
    for other in recordings[1:]:
        ours, theirs = (first.scale, first.seed), (other.selection.scale, other.selection.seed)
        if ours != theirs:
            raise bundle.Unreadable(
                f"{other.name} has scale {theirs[0]} and seed {theirs[1]}, and {recordings[0].name} has scale "
                f"{ours[0]} and seed {ours[1]}: their inputs differ"
            )
    started = time.monotonic()
    names = labels(recordings)
    report = Report(first.scale, first.seed, [_subject(r, n) for r, n in zip(recordings, names, strict=True)])
    files = [{"file": r.name, "label": n, "sha256": r.sha256} for r, n in zip(recordings, names, strict=True)]
    found = Comparison(report, files, manifest_differences(recordings), [])
    table: dict[Task, dict[int, Entry]] = {}
    for index, recording in enumerate(recordings):
        for entry in recording.entries:
            table.setdefault(entry.task, {})[index] = entry
    for task, entries in table.items():
        _compare_task(task, entries, recordings, names, found)
        if tick:
            tick(task)
    report.seconds = time.monotonic() - started
    return found


def _compare_task(
    task: Task, entries: dict[int, Entry], recordings: Sequence[Recording], names: list[str], found: Comparison
) -> None:
    inputs = _inputs(task)
    margins: dict[int, float | None] = {}
    for index, entry in entries.items():
        recording = recordings[index]
        judgement = _judge(entry, recording.contract, inputs)
        row = result(task, judgement, names[index], recording.impl, 0.0)
        margins[index] = row.margin
        found.report.results.append(row)
    found.partial += len(entries) < len(recordings)
    having = [index for index, entry in entries.items() if entry.status is None]
    for output in dict.fromkeys(key for index in having for key in entries[index].outputs):
        sharing = [index for index in having if output in entries[index].outputs]
        if len(sharing) < 2:
            continue
        reference = sharing[0]
        a = entries[reference].outputs[output]
        differing = [i for i in sharing[1:] if not bundle.same_bits(a, entries[i].outputs[output])]
        found.compared += 1
        found.equal += not differing
        for index in differing:
            share, worst, detail = distance(a, entries[index].outputs[output])
            both = (margins[reference], margins[index])
            bounds = None if both[0] is None or both[1] is None else both[0] + both[1]
            found.differences.append(
                Difference(
                    task.name, task.params.dtype, plain(output, 60), names[reference], names[index],
                    share, worst, bounds, detail,
                )
            )  # fmt: skip


def _inputs(task: Task) -> Arrays | None:
    try:
        return task.case.inputs(task.params)
    except Exception:  # noqa: BLE001  the judge meets the same error, and makes a verdict of it
        return None


def _judge(entry: Entry, contract: Contract, inputs: Arrays | None) -> Judgement:
    if entry.status is not None:
        return Judgement(entry.status, detail=entry.detail or "without a reason in the recording")
    return judge_outputs(entry.task, entry.outputs, entry.hashes, contract, inputs)


def distance(a: Array, b: Array) -> tuple[float, float | None, str]:
    """Return the share of elements that differ in a bit, the largest absolute difference, and a remark."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return 1.0, None, f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
    changed = bundle.bits(a) != bundle.bits(b)
    with np.errstate(all="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))[changed]
    worst = float(np.max(gap, initial=0.0))
    share = float(np.count_nonzero(changed)) / max(1, changed.size)
    return share, (worst, None)[not math.isfinite(worst)], "" if math.isfinite(worst) else "not finite in one of them"


def manifest_differences(recordings: Sequence[Recording]) -> list[Fact]:
    """Return what the manifests do not agree on: versions, driver, flags, environment, contract."""
    flat = [_flatten({**{name: r.facts[name] for name in FACTS}, "impl": r.impl}) for r in recordings]
    names = dict.fromkeys(name for facts in flat for name in facts)
    rows = [Fact(plain(name, 80), tuple(facts.get(name) for facts in flat)) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: plain(value, 200)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found.update(_flatten(inner, f"{prefix}.{key}" if prefix else key))
    return found


def _subject(recording: Recording, label: str) -> dict[str, Any]:
    return {"id": label, "impl": recording.impl, **recording.facts}
