# SPDX-License-Identifier: Apache-2.0
"""The report of a run: each process leaves its part, and the first one puts them together."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hal.backend import DeviceInfo
from hal.launch.audit import Entry
from hal.launch.settings import Settings

SCHEMA = "hal.run/1"

_HEADINGS = {
    "change": "changes of meaning",
    "idle": "calls without effect",
    "fallback": "operators that ran another way",
    "refused": "refusals (a program that catches the error goes on)",
}
"""Kinds that are told on the terminal, in the words for many of them."""

_MOST_LINES = 8
"""How many lines of each kind the terminal shows; the report has all."""


def leave(settings: Settings, device: DeviceInfo, entries: Iterable[Entry]) -> None:
    """Write one process's part into the run's folder; a folder that is gone means that the run is over."""
    part = {"process": os.getpid(), "rank": os.environ.get("RANK"), "device": device.as_json(),
            "entries": [entry.as_json() for entry in entries]}  # fmt: skip
    path = Path(settings.folder) / f"{os.getpid()}.json"
    try:
        path.with_suffix(".part").write_text(json.dumps(part))
        path.with_suffix(".part").replace(path)
    except FileNotFoundError:
        return
    except OSError as error:
        say(f"hal run: process {os.getpid()} is missing in the report: {error}\n")


def discard(settings: Settings | None) -> None:
    """Remove the run's folder: its program does not start."""
    if settings is not None:
        shutil.rmtree(settings.folder, ignore_errors=True)


def finish(settings: Settings) -> None:
    """Put the parts together, write the report if one is asked for, and say on stderr what matters."""
    parts = [json.loads(path.read_text()) for path in sorted(Path(settings.folder).glob("*.json"))]
    shutil.rmtree(settings.folder, ignore_errors=True)
    report, written = merged(settings, parts), settings.report
    if written is not None:
        try:
            Path(written).write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            say(f"hal run: the report could not be written: {error}\n")
            written = None
    say(text(report, written))


def say(what: str) -> None:
    """Write to stderr, if there is one."""
    if sys.stderr is not None:  # closed, as by `2>&-`
        sys.stderr.write(what)
        sys.stderr.flush()


def merged(settings: Settings, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of a run, as plain types for JSON."""
    counts: dict[tuple[Any, ...], list[int]] = {}
    for part in parts:
        for entry in part["entries"]:
            key = (entry["file"], entry["line"], entry["api"], entry["kind"], entry["note"])
            sums = counts.setdefault(key, [0, 0])
            sums[0] += entry["calls"]
            sums[1] += entry["nbytes"]
    entries = [
        {"kind": kind, "api": api, "file": file, "line": line, "calls": calls, "note": note, "nbytes": nbytes}
        for (file, line, api, kind, note), (calls, nbytes) in sorted(
            counts.items(), key=lambda item: tuple("" if part is None else str(part) for part in item[0])
        )
    ]
    devices = {part["device"]["id"]: part["device"] for part in parts}
    return {
        "schema": SCHEMA, "command": list(settings.command), "strict": settings.strict,
        "devices": list(devices.values()), "processes": len(parts), "entries": entries,
    }  # fmt: skip


def text(report: dict[str, Any], path: str | None) -> str:
    """Return what a person is told at the end of a run."""
    entries = report["entries"]
    sites = {(e["file"], e["line"]) for e in entries if e["kind"] in ("redirected", "belief", "refused")}
    names = ", ".join(f"{device['id']} ({device['name'] or device['vendor']})" for device in report["devices"])
    if not names:
        return ""
    apis = len({e["api"] for e in entries})
    counts = f"{apis} API{'s' * (apis != 1)} at {len(sites)} line{'s' * (len(sites) != 1)}"
    lines = [f"hal run: CUDA was {names}; {counts}"]
    kinds = Counter(e["kind"] for e in entries)
    for kind, heading in _HEADINGS.items():
        found = [e for e in entries if e["kind"] == kind]
        if not found:
            continue
        lines.append(f"  {heading}: {kinds[kind]}")
        for entry in found[:_MOST_LINES]:
            place = "" if entry["file"] is None else f"{_short(entry['file'])}:{entry['line']}: "
            lines.append(f"    {place}{entry['api']}: {entry['note']}")
        if len(found) > _MOST_LINES:
            lines.append(f"    and {len(found) - _MOST_LINES} more")
    if path is not None:
        lines.append(f"  report: {path}")
    return "\n".join(lines) + "\n"


def _short(file: str) -> str:
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
