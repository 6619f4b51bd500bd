# SPDX-License-Identifier: Apache-2.0
"""The terminal's view of a comparison: the manifests first, since they usually explain the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from hal_conformance.table import MAX_ROWS, show_notable, show_tally
from hal_conformance.tally import notable, verdict
from hal_conformance.text import plain

if TYPE_CHECKING:
    from hal_conformance.compare import Comparison, Difference


def show(found: Comparison, out: Console) -> None:
    """Print a comparison."""
    report = found.report
    if len(report.subjects) > 1:
        _show_facts(found, out)
    for subject in report.subjects:
        rows = [row for row in report.results if row.subject == subject["id"]]
        show_tally(subject, rows, out)
    show_notable(notable(report.results), out, subjects=len(report.subjects) > 1)
    if len(report.subjects) > 1:
        _show_differences(found, out)
    green = not any(row.status.colour == "red" for row in report.results)
    out.print(Text(verdict(report.results, 0, report.seconds), style="bold green" if green else "bold red"))


def _show_facts(found: Comparison, out: Console) -> None:
    if not found.facts:
        out.print(Text("manifests: no difference in device, contract, versions, environment or flags"))
        return
    out.print(Text("manifests differ:", style="bold"))
    for fact in found.facts:
        out.print(Text(f"  {fact.name}"))
        for subject, value in zip(found.report.subjects, fact.values, strict=True):
            shown = "(not there)" if value is None else plain(value)
            out.print(Text(f"    {plain(subject['id'], 60)}: {shown}", style="dim"))


def _show_differences(found: Comparison, out: Console) -> None:
    differences = sorted(found.differences, key=lambda d: (-(d.bounds or 0.0), -d.share))
    for difference in differences[:MAX_ROWS]:
        out.print(_line(difference))
    if len(differences) > MAX_ROWS:
        out.print(Text(f"... and {len(differences) - MAX_ROWS} more; --json has them all"))
    if found.partial:
        out.print(Text(f"{found.partial} cases are not in all of the recordings"))
    differing = found.compared - found.equal
    out.print(Text(f"between recordings: {found.equal} of {found.compared} outputs are bit-equal, {differing} differ"))


def _line(difference: Difference) -> Text:
    share = f"{100 * difference.share:.3g} % of the elements"
    worst = "" if difference.worst is None else f", at most {difference.worst:.3g} apart"
    bounds = "" if difference.bounds is None else f", within {difference.bounds:.3g} bounds"
    remark = f", {plain(difference.detail)}" if difference.detail else ""
    text = Text(f"{'differs':<16}", style="yellow")
    text.append(f"{plain(difference.case)} {difference.dtype} {difference.output}", style="")
    return text.append(f"\n                {share}{worst}{bounds}{remark} ({plain(difference.b, 60)})", style="dim")
