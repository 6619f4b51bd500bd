# SPDX-License-Identifier: Apache-2.0
"""The terminal's view of a run, in 100 columns: counts, then everything that is not green, then one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from hal.cli import output
from hal_conformance.report import agreement_table
from hal_conformance.report.tally import missing_devices, notable, tally, verdict
from hal_conformance.text import plain
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from rich.console import Console

    from hal_conformance.report.report import NotRun, Report
    from hal_conformance.result import Result

WIDTH = 100
STYLES = {"green": "green", "amber": "yellow", "red": "bold red", "neutral": "dim"}

LABEL = 140
"""Characters of a subject's name: longer than any that `compare` makes, which tell recordings apart at their ends."""
MAX_ROWS = 60
"""Lines of the list of what is not green; the JSON report has them all."""


def console(*, stderr: bool = False) -> Console:
    """Return a console of at most 100 columns that interprets no markup in what it prints."""
    made = output.console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=False)
    made.width = min(made.width, WIDTH) if made.is_terminal else WIDTH
    return made


def show(report: Report, out: Console, *, strict: bool = False) -> None:
    """Print a report; the last line says what the exit status says."""
    for subject in report.subjects:
        rows = [r for r in report.results if (r.subject, r.impl) == (subject["id"], subject["impl"])]
        show_tally(subject, [row for row in rows if row.status is not Status.SAME_AS_CPU], out)
        show_same(rows, out)
        show_contract(subject, out)
        show_arithmetic(rows, out)
        show_certificates(report, subject, out)
        out.print()
    agreement_table.show(report.agreement, out)
    if report.agreement:
        out.print()
    show_notable(notable(report.results), out, subjects=len(report.subjects) > 1)
    show_not_run(report.not_run, report.required_missing, out)
    for note in report.notes:
        out.print(Text(f"note: {plain(note)}", style="dim"))
    missing = missing_devices(report)
    status = report.exit_status(strict=strict)
    faults = ["--strict allows nothing amber"] if status > report.exit_status() else []
    line = verdict(report.results, missing, report.seconds, faults=faults)
    out.print(Text(line, style="bold green" if not status else "bold red"))


def show_tally(subject: dict[str, Any], rows: list[Result], out: Console) -> None:
    """Print one subject's counts by family and dtype."""
    info = subject["info"]
    name = plain(info.get("name") or "unnamed", 60)
    simulated = ", simulated" if info.get("simulated") and "simulated" not in name else ""
    title = f"{plain(subject['id'], LABEL)}: {name}{simulated}, implementation {plain(subject['impl'], 60)}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title, style="bold"), title_justify="left")
    table.add_column("family")
    table.add_column("dtype")
    timed = any(row.seconds for row in rows)  # a recording does not say how long it took
    headings = ("exact", "pass", "ambiguous", "amber", "red", "not judged", "worst margin", *["seconds"] * timed)
    for heading in headings:
        table.add_column(heading, justify="right")
    family = ""
    for t in tally(rows):
        colours = {colour: t.colour(colour) for colour in STYLES}
        cells = [
            *((str(t.count(status)), "green") for status in (Status.EXACT, Status.PASS, Status.PASS_AMBIGUOUS)),
            *((str(colours[colour]), STYLES[colour]) for colour in ("amber", "red", "neutral")),
            ("" if t.margin is None else f"{t.margin:.3g}", STYLES["red"] if (t.margin or 0) > 1 else ""),
            *[(f"{t.seconds:.2f}", "dim")] * timed,
        ]
        table.add_row(
            Text(t.family if t.family != family else ""),
            Text(t.dtype),
            *(Text("·" if text == "0" else text, style="dim" if text == "0" else style) for text, style in cells),
        )
        family = t.family
    out.print(table)


def show_certificates(report: Report, subject: dict[str, Any], out: Console) -> None:
    """Print what the results of one subject certify, dtype by dtype."""
    for found in report.certificates:
        if (found.subject, found.impl) == (subject["id"], subject["impl"]):
            out.print(Text(f"certificate at {report.scale}, {found.dtype}: {plain(found.sentence())}"))


def show_same(rows: list[Result], out: Console) -> None:
    """Print how many results cannot differ from the CPU's, and of which families."""
    families: dict[str, list[bool]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row.status is Status.SAME_AS_CPU)
    if count := sum(map(sum, families.values())):
        whole = ", ".join(plain(family) for family, same in families.items() if all(same))
        partly = ", ".join(plain(family) for family, same in families.items() if any(same) and not all(same))
        parts = "; ".join(filter(None, (whole, f"a part of {partly}" if partly else "")))
        out.print(Text(f"same as cpu {count} results that never reach a simulated unit: {parts}", style="dim"))


def show_contract(subject: dict[str, Any], out: Console) -> None:
    """Print what a device was held to that nobody has published."""
    contract = subject["contract"]
    if contract["basis"] != "known":
        out.print(Text(f"contract    {plain(contract['evidence'])}"))


def show_arithmetic(rows: list[Result], out: Console) -> None:
    """Print what the probes of the contract found, for each dtype."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.family == "contract" and row.status.colour == "green" and row.detail:
            found.setdefault(row.dtype, []).append(row.detail)
    for dtype, details in found.items():
        out.print(Text(f"arithmetic  {dtype:<9} {plain('; '.join(details))}"))


def show_notable(rows: list[Result], out: Console, *, subjects: bool) -> None:
    """Print what is not green, each on lines of its own; equal reasons of neutral results are merged."""
    merged: dict[tuple[str, ...], list[Result]] = {}
    for row in rows:
        neutral = row.status.colour == "neutral"
        key = (row.status.value, row.subject, row.dtype, row.detail) if neutral else (str(id(row)),)
        merged.setdefault(key, []).append(row)
    for group in list(merged.values())[:MAX_ROWS]:
        row = group[0]
        what = plain(row.case) if len(group) == 1 else f"{len(group)} cases"
        where = f" on {plain(row.subject, LABEL)}" + (f" ({plain(row.impl, 40)})" if row.impl != "torch" else "")
        line = Text(f"{row.status.value:<15}", style=STYLES[row.status.colour])
        line.append(f"{what} {row.dtype}{where if subjects else ''}", style="")
        margin = "" if row.margin is None else f"margin {row.margin:.3g}; "
        if margin or row.detail:
            line.append(f"\n                {margin}{plain(row.detail)}", style="dim")
        out.print(line)
    if len(merged) > MAX_ROWS:
        out.print(Text(f"... and {len(merged) - MAX_ROWS} more; --json has them all"))


def show_not_run(not_run: Iterable[NotRun], missing: Iterable[str], out: Console) -> None:
    """Print which devices gave no results, and why."""
    for entry in not_run:
        style = STYLES["red"] if entry.failed else STYLES["neutral"]
        line = Text(f"{'not run':<16}", style=style)
        out.print(line.append(f"{plain(entry.subject)}: {entry.kind}: {plain(entry.reason)}", style=""))
    for glob in missing:
        line = Text(f"{'not run':<16}", style=STYLES["red"])
        out.print(line.append(f"{plain(glob)}: required, and no such device was judged", style=""))
