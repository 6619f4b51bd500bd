# SPDX-License-Identifier: Apache-2.0
"""`hal conformance list` and `explain`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import click
from rich import box
from rich.table import Table
from rich.text import Text

from hal.errors import ConfigError
from hal_conformance.case import SCALES
from hal_conformance.execution.plan import Catalogue, Selection, closest, plan
from hal_conformance.report.document import to_json
from hal_conformance.report.table import WIDTH, console
from hal_conformance.text import plain
from hal_conformance.version import suite_version


def show_cases(*, as_json: bool) -> None:
    """Print every case on stdout."""
    cases = Catalogue().all()
    if as_json:
        rows = [
            {
                "name": case.name, "family": case.family, "what": case.what, "needs": list(case.needs),
                "presets": {preset: list(case.scales(preset)) for preset in case.presets()},
                "dtypes": list(case.dtypes()),
            }
            for case in cases
        ]  # fmt: skip
        document = {"schema": "hal.conformance.cases/2", "suite": suite_version(), "cases": rows}
        click.echo(to_json(document).decode(), nl=False)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("case", "family", "presets", "dtypes", "needs"):
        table.add_column(heading, justify="right" if heading == "presets" else "left", no_wrap=heading == "case")
    for case in cases:
        columns = (case.name, case.family, str(len(case.presets())), " ".join(case.dtypes()), " ".join(case.needs))
        table.add_row(*map(Text, columns))
    out = console()
    out.print(table)
    at = ", ".join(f"{len(plan(Selection(scale=scale), cases))} at {scale}" for scale in SCALES)
    out.print(Text(f"{len(cases)} cases; results for each subject: {at}; suite {suite_version()}"))


def explain(name: str) -> None:
    """Print what a case checks, on stdout. The name may carry a preset.

    Raises:
        ConfigError: there is no such case.
    """
    catalogue = Catalogue()
    base = name.partition("[")[0]
    try:
        case = catalogue.by_name(base)
    except KeyError:
        near = closest(base, catalogue.all())
        hint = " or ".join(near) if near else "hal conformance list"
        raise ConfigError(f"there is no case {plain(name, 80)!r}", hint=hint) from None
    click.echo(f"{case.name} ({case.family})\n")
    for paragraph in case.what.strip().split("\n\n"):
        click.echo(textwrap.fill(" ".join(paragraph.split()), WIDTH) + "\n")
    _names("calls", case.needs)
    _names("dtypes", case.dtypes())
    _names("presets", case.presets())
    for scale in SCALES:
        at = [preset for preset in case.presets() if scale in case.scales(preset)]
        if len(at) < len(case.presets()):
            _names(f"at {scale}", at)


def _names(label: str, names: Sequence[str]) -> None:
    click.echo(textwrap.fill(f"{label + ':':10}{', '.join(names) or 'none'}", WIDTH, subsequent_indent=" " * 10))
