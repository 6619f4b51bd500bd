# SPDX-License-Identifier: Apache-2.0
"""`hal devices`: which devices are here. Opens nothing."""

from __future__ import annotations

import json
import sys

import click

from hal import plugins
from hal.backend import DeviceInfo
from hal.cli.output import console, on_terminal, plain, say, stdout_for_results
from hal.errors import Absent
from hal.surveys import Survey, settle, take_surveys

SCHEMA = "hal.devices/1"


@click.command(short_help="List the devices that are here; opens none.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def devices(as_json: bool) -> None:
    """List the devices of all installed backends, without opening one. Those in a simulator are marked.

    A backend that is broken is named on stderr; `hal doctor` finds out more. HAL_BACKENDS limits who is asked.
    """
    with stdout_for_results():
        surveys = take_surveys()
    found, lost = settle(surveys)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "devices": [info.as_json() for info in found]}, indent=2))
    elif on_terminal(sys.stdout):
        _print_rich(found)
    else:
        _print_plain(found)
    _tell_the_rest(surveys, lost)


HEADINGS = ("ID", "VENDOR", "NAME", "ARCH", "MEMORY", "TORCH", "KIND")


def row(info: DeviceInfo) -> tuple[str, ...]:
    """Return what the table shows of a device; what is unknown is a dash."""
    memory = "-" if info.total_memory is None else f"{info.total_memory / 2**30:.1f} GiB"
    kind = "simulated" if info.simulated else "real"
    cells = (info.id, info.vendor, info.name or "-", info.arch or "-", memory, info.torch_device, kind)
    return tuple(map(plain, cells))


def _print_rich(found: list[DeviceInfo]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading.capitalize() if heading != "ID" else heading, overflow="fold")
    for info in found:
        table.add_row(*map(Text, row(info)), style="dim" if info.simulated else None)
    console(highlight=False).print(table)


def _print_plain(found: list[DeviceInfo]) -> None:
    rows = [HEADINGS, *map(row, found)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADINGS))]
    for cells in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())


def _tell_the_rest(surveys: list[Survey], lost: dict[str, str]) -> None:
    for answer in surveys:
        if isinstance(answer.error, Absent):
            _tell(f"{answer.name}: absent: {answer.error.reason}")
        elif answer.error is not None:
            reason = str(answer.error).removeprefix(f"{answer.name}: ")
            _tell(f"{answer.name}: BROKEN: {reason}", bad=True)
        for note in answer.discovery.left:
            _tell(f"{answer.name}: left to others: {note}")
    for device, reason in lost.items():
        _tell(f"{device}: not listed: {reason}")
    for problem in plugins.unreadable():
        _tell(problem, bad=True)


def _tell(message: str, *, bad: bool = False) -> None:
    say(plain(message, indent=2), dim=not bad, fg="red" if bad else None)
