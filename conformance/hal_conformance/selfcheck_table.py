# SPDX-License-Identifier: Apache-2.0
"""The self-check for people: fault by detector, on a terminal and as Markdown."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hal_conformance.case import FAMILIES
from hal_conformance.selfcheck import DETECTORS, exit_status
from hal_conformance.text import markdown as cell
from hal_conformance.version import suite_version

if TYPE_CHECKING:
    from hal_conformance.execution.plan import Selection
    from hal_conformance.selfcheck import Outcome


def sentence(outcomes: Sequence[Outcome]) -> str:
    """Return the verdict in one sentence."""
    faults, others = _of(outcomes, "fault"), _of(outcomes, "benign")
    flagged, green = sum(o.right for o in faults), sum(o.right for o in others)
    return f"{flagged} of {len(faults)} faults flagged, {green} of {len(others)} benign variations green"


def show(outcomes: Sequence[Outcome], out: Console) -> None:
    """Print the matrix: in how many results each detector spoke against each variation."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variation", no_wrap=True)
    spoke = [name for name in DETECTORS if any(outcome.by[name] for outcome in outcomes)]
    for name in spoke:
        table.add_column(name, justify="right")
    for outcome in outcomes:
        style = "" if outcome.right else "bold red"
        numbers = (str(outcome.by[name] or "·") for name in spoke)
        table.add_row(Text(outcome.variation.name, style=style), *numbers)
    out.print(table)
    for outcome in outcomes:
        if not outcome.right:
            out.print(Text(f"{outcome.variation.name} ({outcome.variation.kind}): {_why(outcome)}", style="red"))
    out.print(Text(sentence(outcomes), style="bold red" if exit_status(outcomes) else "bold green"))


def _why(outcome: Outcome) -> str:
    nothing = "nothing flagged it" if outcome.judged else "nothing was judged"
    return "; ".join(outcome.details) or nothing


def markdown(outcomes: Sequence[Outcome], selection: Selection, seconds: float) -> bytes:
    """Return the matrix as Markdown: what was run where, each fault by detector, and each benign variation."""
    return ("\n".join([*_head(outcomes, selection, seconds), *_faults(outcomes), *_benign(outcomes)]) + "\n").encode()


def _of(outcomes: Sequence[Outcome], kind: str, family: str = "") -> list[Outcome]:
    return [o for o in outcomes if o.variation.kind == kind and family in ("", family_of(o))]


def family_of(outcome: Outcome) -> str:
    """Return the family under which an outcome is shown: the first one that the variation changes."""
    return outcome.variation.families[0] if outcome.variation.families else "layer"


def _head(outcomes: Sequence[Outcome], selection: Selection, seconds: float) -> Iterator[str]:
    import torch

    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"**{cell(sentence(outcomes))}.**"
    yield ""
    how = f"scale {selection.scale}, seed {selection.seed}, {seconds:.0f} s"
    yield f"{today}, {cell(suite_version())}, {cell(where)}; {how}."
    alone = Counter(next(iter(by)) for o in _of(outcomes, "fault") if len(by := +o.by) == 1)
    if alone:
        yield ""
        yield (
            f"{sum(alone.values())} faults are seen by a single detector: "
            f"{', '.join(f'{name} {alone[name]}' for name in DETECTORS if alone[name])}."
        )
    yield ""
    yield "| family | faults | flagged | benign variations | green |"
    yield "|---|---:|---:|---:|---:|"
    for family in FAMILIES:
        faults, others = _of(outcomes, "fault", family), _of(outcomes, "benign", family)
        if faults or others:
            numbers = (len(faults), sum(o.right for o in faults), len(others), sum(o.right for o in others))
            yield f"| {family} | {' | '.join(map(str, numbers))} |"


def _faults(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for family in FAMILIES:
        faults = _of(outcomes, "fault", family)
        if not faults:
            continue
        yield ""
        yield f"### Faults: {family}"
        yield ""
        yield f"| fault | what is wrong | public bug | flagged first by | {' | '.join(DETECTORS)} |"
        yield "|---|---|---|---|" + "---:|" * len(DETECTORS)
        for o in faults:
            first = o.cases[0] if o.cases else "**nothing**"
            numbers = " | ".join(str(o.by[name] or "") for name in DETECTORS)
            of = o.variation
            yield f"| {cell(of.name)} | {cell(of.what)} | {cell(of.bug)} | {cell(first)} | {numbers} |"


def _benign(outcomes: Sequence[Outcome]) -> Iterator[str]:
    others = _of(outcomes, "benign")
    if not others:
        return
    yield ""
    yield "### Benign variations"
    yield ""
    yield "| variation | what differs | verdict |"
    yield "|---|---|---|"
    for o in others:
        verdict = f"green in {o.judged} results" if o.right else f"**{cell(_why(o))}**"
        yield f"| {cell(o.variation.name)} | {cell(o.variation.what)} | {verdict} |"
