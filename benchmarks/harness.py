# SPDX-License-Identifier: Apache-2.0
"""Side-by-side measurements: A and B in turn in one run, medians and ratios, the machine described.

A shared machine drifts by a factor of two within minutes, so that two figures from two runs say nothing. Here every
round measures all subjects once, in an order of its own, and a ratio is the median of the ratios round by round, with
the interval that holds the median of all such rounds in 95 of 100 measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

import hal


@dataclass(frozen=True)
class Subject:
    """One thing to measure.

    Attributes:
        name: for the table.
        run: does it once and returns the cost, in `unit`.
        baseline: name of the subject that it is compared with, or None.
        target: what is promised, as text; "" if nothing is.
    """

    name: str
    run: Callable[[], float]
    baseline: str | None = None
    target: str = ""


@dataclass(frozen=True)
class Group:
    """Subjects that are measured in turn.

    Attributes:
        unit: of their costs.
        subjects: one or more.
        repeats: rounds for each one that is asked for: many, where a sample is short.
    """

    unit: str
    subjects: Sequence[Subject]
    repeats: int = 1


def command(*arguments: str) -> Callable[[], float]:
    """Return a measurement of a whole process: wall seconds, its output thrown away."""

    def run() -> float:
        start = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    return run


def peak_gib(*arguments: str) -> Callable[[], float]:
    """Return a measurement of a whole process and its children: the largest sum of their resident memory, in GiB."""

    def run() -> float:
        peak = 0
        process = psutil.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(p.memory_info().rss for p in (process, *process.children(recursive=True))))
            time.sleep(0.02)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, arguments)
        return peak / 2**30

    return run


def loop(body: Callable[[], object], calls: int = 2000) -> Callable[[], float]:
    """Return a measurement of one call in this process: microseconds, the mean of a loop of `calls`."""

    def run() -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            body()
        return (time.perf_counter_ns() - start) / calls / 1e3

    return run


def interval_of_median(samples: Sequence[float]) -> tuple[float, float]:
    """Return two of the samples between which the median of what they come from lies in 95 of 100 measurements.

    Of n samples as many lie below that median as heads are thrown with n fair coins (the sign test turned round;
    Conover 1999, section 3.2). Fewer than six samples cannot tell: these give their extremes.
    """
    ordered, n = sorted(samples), len(samples)
    outside = below = 0
    while True:
        below += math.comb(n, outside)
        if below > 0.025 * 2**n:
            break
        outside += 1
    last = max(outside - 1, 0)
    return ordered[last], ordered[n - 1 - last]


def measure(group: Group, asked: int) -> list[dict[str, object]]:
    """Measure every subject once a round, after one round that does not count, and return a row each."""
    subjects, rounds, order = list(group.subjects), asked * group.repeats, random.Random(0)
    samples: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for number in range(rounds + 1):
        for subject in order.sample(subjects, len(subjects)):
            cost = subject.run()
            if number:
                samples[subject.name].append(cost)
    rows: list[dict[str, object]] = []
    for subject in subjects:
        mine = samples[subject.name]
        row: dict[str, object] = {
            "name": subject.name, "unit": group.unit, "rounds": rounds,
            "median": statistics.median(mine), "min": min(mine), "max": max(mine), "target": subject.target,
        }  # fmt: skip
        if subject.baseline is not None:
            other = samples[subject.baseline]
            row["baseline"] = subject.baseline
            ratios = [a / b for a, b in zip(mine, other, strict=True)]
            row["ratio"], row["ratio_interval"] = statistics.median(ratios), interval_of_median(ratios)
            row["difference"] = statistics.median(a - b for a, b in zip(mine, other, strict=True))
        rows.append(row)
    return rows


def machine() -> dict[str, object]:
    """Describe where the figures come from."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": next(info.name for info in hal.list_devices() if info.id == "cpu"),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "click", "moe-hal")},
    }


def markdown(title: str, about: dict[str, object], rows: Sequence[dict[str, object]]) -> str:
    """Return the table as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())  # type: ignore[attr-defined]
    lines = [
        f"# {title}",
        "",
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, Python {about['python']}, {versions}",
        "",
        "| what | median | min | max | unit | against | ratio | 95 % of it | difference | promised |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = interval = difference = ""
        if "ratio" in row:
            low, high = row["ratio_interval"]  # type: ignore[misc]
            ratio, interval, difference = f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['difference']:.3f}"
        lines.append(
            f"| {row['name']} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} | {row['unit']} "
            f"| {row.get('baseline', '')} | {ratio} | {interval} | {difference} | {row['target']} |"
        )
    return "\n".join(lines) + "\n"


def main(
    name: str,
    title: str,
    groups: Sequence[Group],
    more: Callable[[], tuple[dict[str, object], str]] | None = None,
) -> None:
    """Command line of one benchmark: measure all groups and write JSON and Markdown under `results/`.

    Args:
        name: of the files.
        title: of the table.
        groups: what is measured, one group after the other.
        more: called at the end; entries of the JSON, and Markdown that follows the table.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    about = machine()
    rows = [row for group in groups for row in measure(group, options.rounds)]
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"schema": "hal.benchmark/1", "name": name, "machine": about, "rows": rows}
    text = markdown(title, about, rows)
    if more is not None:
        entries, words = more()
        report |= entries
        text += words
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(text)
    sys.stdout.write(text)
