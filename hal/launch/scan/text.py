# SPDX-License-Identifier: Apache-2.0
"""A scan in words and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from hal.launch.scan.outlook import Backend, outlook, outlooks
from hal.launch.scan.program import Program
from hal.launch.scan.sites import Site

SCHEMA = "hal.scan/1"
_MOST_LINES = 3
"""Lines that the table names of each API; `--json` has all, and `--lines` prints all."""


def as_json(program: Program, backends: Sequence[Backend]) -> dict[str, Any]:
    """Return plain types for JSON, in the form `hal.scan/1`."""
    return {
        "schema": SCHEMA,
        "path": str(program.path),
        "files": program.files,
        "unreadable": program.unreadable,
        "notebooks": program.notebooks,
        "summary": {backend: _counts(program, backend) for backend in backends},
        "sites": [
            {
                "file": site.file, "line": site.line, "api": site.api, "kind": site.kind, "certain": site.certain,
                "outlook": {backend: {"verdict": found.verdict, "note": found.note}
                            for backend, found in outlooks(site, tuple(backends)).items()},
            }
            for site in program.sites
        ],
    }  # fmt: skip


def _counts(program: Program, backend: Backend) -> dict[str, int]:
    counts = Counter(outlook(site.api, backend).verdict for site in program.sites)
    return {verdict: counts[verdict] for verdict in ("native", "emulated", "refused")}


def rows(program: Program, backends: Sequence[Backend]) -> list[tuple[str, ...]]:
    """Return a row for each API: where it is used, and what will happen; what is refused somewhere comes first."""
    by_api: dict[str, list[Site]] = defaultdict(list)
    for site in program.sites:
        by_api[site.api].append(site)

    def place(api: str) -> tuple[int, int, str]:
        verdicts = {outlook(api, backend).verdict for backend in backends}
        worst = 0 if "refused" in verdicts else 1 if "emulated" in verdicts else 2
        return worst, -len(by_api[api]), api

    found = []
    for api in sorted(by_api, key=place):
        here = by_api[api]
        where = [f"{site.file}:{site.line}" for site in here[:_MOST_LINES]]
        more = [f"and {len(here) - _MOST_LINES} more"] if len(here) > _MOST_LINES else []
        verdicts = [outlook(api, backend).verdict for backend in backends]
        found.append((api, str(len(here)), *verdicts, ", ".join(where + more)))
    return found


def notes(program: Program, backends: Sequence[Backend]) -> list[str]:
    """Return what is to be known of each API that is refused somewhere."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for api in dict.fromkeys(site.api for site in program.sites):
        for backend in backends:
            here = outlook(api, backend)
            if here.verdict == "refused":
                found[api, here.note].append(backend)
    return [f"{api} on {', '.join(where)}: {note}" for (api, note), where in sorted(found.items())]


def last_line(program: Program, backends: Sequence[Backend]) -> str:
    """Return the sentence under the table."""
    counts = ", ".join(f"{backend} {_counts(program, backend)['refused']}" for backend in backends)
    what = f"refused on {counts}" if program.sites else "nothing that is specific to CUDA"
    left = f"; not read: {len(program.notebooks)} notebooks" if program.notebooks else ""
    return f"{len(program.sites)} sites in {program.files} Python files; {what}{left}"
