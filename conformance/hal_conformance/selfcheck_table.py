# SPDX-License-Identifier: Apache-2.0
"""The self-check for people: fault by detector, on a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hal_conformance.selfcheck import DETECTORS, exit_status
from hal_conformance.text import markdown as cell

if TYPE_CHECKING:
    from hal_conformance.selfcheck import Outcome


def sentence(outcomes: Sequence[Outcome]) -> str:
    """Return the verdict in one sentence."""
    faults = [o for o in outcomes if o.variation.kind == "fault"]
    others = [o for o in outcomes if o.variation.kind == "benign"]
    flagged, green = sum(o.right for o in faults), sum(o.right for o in others)
    return f"{flagged} of {len(faults)} faults flagged, {green} of {len(others)} benign variations green"


def show(outcomes: Sequence[Outcome], out: Console) -> None:
    """Print the matrix: in how many results each detector spoke against each variation."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variation", no_wrap=True)
    for name in DETECTORS:
        table.add_column(name, justify="right")
    for outcome in outcomes:
        style = "" if outcome.right else "bold red"
        numbers = (str(outcome.by[name] or "·") for name in DETECTORS)
        table.add_row(Text(outcome.variation.name, style=style), *numbers)
    out.print(table)
    for outcome in outcomes:
        if not outcome.right:
            said = "; ".join(outcome.details) or "nothing flagged it"
            out.print(Text(f"{outcome.variation.name} ({outcome.variation.kind}): {said}", style="red"))
    out.print(Text(sentence(outcomes), style="bold red" if exit_status(outcomes) else "bold green"))


def markdown(outcomes: Sequence[Outcome]) -> bytes:
    """Return the matrix as Markdown, with what each variation is and the first case that flagged it."""
    return ("\n".join(_lines(outcomes)) + "\n").encode()


def _lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"**{cell(sentence(outcomes))}.** In how many results each detector spoke against a fault:"
    yield ""
    yield f"| fault | what is wrong | public bug | flagged first by | {' | '.join(DETECTORS)} |"
    yield "|---|---|---|---|" + "---:|" * len(DETECTORS)
    for o in outcomes:
        if o.variation.kind == "fault":
            first = o.cases[0] if o.cases else "**nothing**"
            numbers = " | ".join(str(o.by[name] or "") for name in DETECTORS)
            of = o.variation
            yield f"| {cell(of.name)} | {cell(of.what)} | {cell(of.bug)} | {first} | {numbers} |"
    yield ""
    yield "| benign variation | what differs | verdict |"
    yield "|---|---|---|"
    for o in outcomes:
        if o.variation.kind == "benign":
            verdict = f"green in {o.judged} results" if o.right else f"**{cell('; '.join(o.details))}**"
            yield f"| {cell(o.variation.name)} | {cell(o.variation.what)} | {verdict} |"
