# SPDX-License-Identifier: Apache-2.0
"""The terminal's view of a comparison: the manifests first, since they usually explain the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from hal_conformance.recordings.agreement import MOST
from hal_conformance.recordings.grouping import is_identity
from hal_conformance.report import agreement_table
from hal_conformance.report.table import LABEL, MAX_ROWS, show_certificates, show_notable, show_tally
from hal_conformance.report.tally import notable, verdict
from hal_conformance.text import plain

if TYPE_CHECKING:
    from hal_conformance.recordings.compare import Comparison, Difference, Fact
    from hal_conformance.recordings.grouping import Group, Grouping

TABLES = 4
"""Recordings of which each has a table; of more, those that are green have a line."""
FACTS, VALUES = 40, 12
"""Facts in which manifests differ that are printed, and values of each: nobody reads more, and a forged one may have
any number."""
_BY_IMPORTANCE = ("impl", "info", "contract", "changes", "versions", "flags", "kernels", "environment")


def show(found: Comparison, out: Console, *, strict: bool = False) -> None:
    """Print a comparison; the last line says what the exit status says."""
    report = found.report
    if len(report.subjects) > 1:
        _show_facts(found, out)
    for note in report.notes[:MAX_ROWS]:
        out.print(Text(plain(note, 300)))
    for subject in report.subjects:
        rows = [row for row in report.results if row.subject == subject["id"]]
        if len(report.subjects) > TABLES and all(row.status.colour in ("green", "neutral") for row in rows):
            green = sum(row.status.colour == "green" for row in rows)
            out.print(
                Text(f"{plain(subject['id'], LABEL)}: {green} green, {len(rows) - green} not judged", style="green")
            )
        else:
            show_tally(subject, rows, out)
            show_certificates(report, subject, out)
    show_notable(notable(report.results), out, subjects=len(report.subjects) > 1)
    if len(report.subjects) > 1:
        agreement_table.show(report.agreement, out)
        if not report.agreement:
            out.print(
                Text(f"agreement of pairs: not of more than {MOST} recordings; --group-by names the odd one", "dim")
            )
        _show_differences(found, out)
    if found.grouping is not None:
        _show_groups(found.grouping, out)
    judged, elements = (sum(r[key] for r in found.recordings) for key in ("elements_judged_here", "elements"))
    out.print(Text(f"judged here: {judged} of {elements} elements, those that are held; all of them by the recorders"))
    amber = found.grouping is not None and found.grouping.colour() == "amber"
    faults = [plain(fault) for fault in found.faults(strict=strict)]
    line = verdict(report.results, 0, report.seconds, faults=faults, amber=amber)
    style = "bold red" if found.exit_status(strict=strict) else "bold green"
    out.print(Text(line, style=style), soft_wrap=True)  # one line, however long a label is


def _show_facts(found: Comparison, out: Console) -> None:
    if not found.facts:
        out.print(Text("manifests: no difference in device, contract, versions, environment or flags"))
        return
    out.print(Text("manifests differ:", style="bold"))
    facts = sorted(found.facts, key=_importance)
    for fact in facts[:FACTS]:
        out.print(Text(f"  {fact.name}"))
        having: dict[str, list[str]] = {}
        for subject, value in zip(found.report.subjects, fact.values, strict=True):
            having.setdefault("(not there)" if value is None else plain(value), []).append(plain(subject["id"], LABEL))
        for value, those in list(having.items())[:VALUES]:
            who = ", ".join(those) if len(those) <= 2 else f"{those[0]} and {len(those) - 1} others"
            out.print(Text(f"    {who}: {value}", style="dim"))
        if len(having) > VALUES:
            out.print(Text(f"    and {len(having) - VALUES} more values", style="dim"))
    if len(facts) > FACTS:
        out.print(Text(f"  and {len(facts) - FACTS} more; --json has them all"))


def _importance(fact: Fact) -> tuple[bool, int]:
    """Return where a fact stands among others: what explains numbers first, which card it is last."""
    part = fact.name.split(".")[0]
    order = _BY_IMPORTANCE.index(part) if part in _BY_IMPORTANCE else len(_BY_IMPORTANCE)
    return is_identity(fact.name), order


def _show_differences(found: Comparison, out: Console) -> None:
    # In the order of the suite: what others are made of comes first, and often explains them.
    for difference in found.differences[:MAX_ROWS]:
        out.print(_line(difference))
    if len(found.differences) > MAX_ROWS:
        out.print(Text(f"... and {len(found.differences) - MAX_ROWS} more; --json has them all"))
    if found.partial:
        out.print(Text(f"{found.partial} cases are not in all of the recordings"))
    differing = found.compared - found.equal
    out.print(Text(f"between recordings: {found.equal} of {found.compared} outputs are bit-equal, {differing} differ"))


def _line(difference: Difference) -> Text:
    parts = [f"{100 * difference.share:.3g} % of the elements" if difference.share else ""]
    if difference.share and difference.worst is not None:
        parts.append(f"at most {difference.worst:.3g} apart")
    if difference.margins is not None:
        parts.append("margins of the case {:.3g} and {:.3g}".format(*difference.margins))
    parts.append(plain(difference.detail))
    text = Text(f"{'differs':<16}", style="yellow")
    text.append(f"{plain(difference.case)} {difference.dtype} {difference.output}", style="")
    who = f"{plain(difference.a, LABEL)}, {plain(difference.b, LABEL)}"
    return text.append(f"\n                {', '.join(filter(None, parts))} ({who})", style="dim")


def _show_groups(grouping: Grouping, out: Console) -> None:
    out.print(Text(f"by {plain(grouping.fact, 60)}:", style="bold"))
    for group in grouping.groups.values():
        many = f"{len(group.recordings)} recordings" if len(group.recordings) > 1 else "1 recording"
        out.print(Text(f"  {plain(group.value, 80)}: {many}{_agreement(group)}"))
        for odd in sorted(group.odd.values(), key=lambda odd: -odd.tasks):
            style = "yellow" if odd.explained_by else "bold red"
            reason = (
                f"; {plain('; '.join(odd.explained_by))}" if odd.explained_by else "; nothing in its manifest says why"
            )
            text = Text(f"    odd one out: {plain(odd.recording, LABEL)}", style=style)
            text.append(f"\n      in {odd.tasks} tasks{reason}", style="")
            out.print(text.append(f"\n      first {plain(odd.first)}; {odd.others} others agree", style="dim"))
    if grouping.compared:
        out.print(Text(f"  between groups: {grouping.alike} of {grouping.compared} tasks have the same bits"))
    if grouping.first:
        out.print(Text(f"    first that differs: {plain(grouping.first)}", style="dim"))


def _agreement(group: Group) -> str:
    if not group.compared:
        return ""
    text = f", all alike in {group.alike} of {group.compared} tasks"
    if group.split:
        text += f", {group.split} without a majority (any may be wrong; first {plain(group.first_split, 120)})"
    if group.open:
        text += f", {group.open} not deterministic (each has bits of its own; first {plain(group.first_open, 120)})"
    return text
