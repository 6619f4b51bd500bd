# SPDX-License-Identifier: Apache-2.0
"""`hal scan`: what will happen to each line of a program that is specific to CUDA. Runs nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from hal.cli.output import console, on_terminal, plain, say
from hal.errors import ConfigError
from hal.exit_status import FINDINGS
from hal.launch.scan import text
from hal.launch.scan.outlook import BACKENDS, Backend, outlooks
from hal.launch.scan.program import Program, scan


@click.command("scan", short_help="Tell what will happen to each CUDA call of a program.")
@click.option(
    "--backend", "-b", "chosen", multiple=True, type=click.Choice(BACKENDS), help="Only these; several times."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all sites as JSON; - is stdout.")
@click.option("--lines", is_flag=True, help="A line for each site, as compilers write them.")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path, chosen: tuple[Backend, ...], json_file: str | None, lines: bool) -> None:
    """Read PATH, a file or a folder, and tell what each line that is specific to CUDA will do on each backend.

    native: the backend does it. emulated: `hal run` does something of equal meaning. refused: an error says why not.
    Nothing is run, and torch is not needed. Exit status: 1 if something is refused on one of the backends, 2 if PATH
    cannot be read.
    """
    try:
        program = scan(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no file or folder {str(path)!r}") from None
    backends = tuple(dict.fromkeys(chosen)) or BACKENDS
    if not program.files and program.unreadable and path.is_file():
        ((name, reason),) = program.unreadable.items()
        raise ConfigError(f"{name} cannot be read: {reason}", expected="a Python file")
    if json_file is not None:
        _write(json_file, json.dumps(text.as_json(program, backends), indent=1) + "\n")
    if json_file != "-":
        _print(program, backends, lines)
    for name, reason in program.unreadable.items():
        say(f"hal scan: {plain(name)}: not read: {plain(reason)}")
    if text.notes(program, backends):
        sys.exit(FINDINGS)


def _write(file: str, content: str) -> None:
    if file == "-":
        click.echo(content, nl=False)
        return
    try:
        Path(file).write_text(content)
    except OSError as error:
        raise ConfigError(f"{file!r} cannot be written: {error}") from None


def _print(program: Program, backends: tuple[Backend, ...], lines: bool) -> None:
    if lines:
        for site in program.sites:
            said = ", ".join(f"{backend} {found.verdict}" for backend, found in outlooks(site, backends).items())
            unsure = "" if site.certain else " (if its device is CUDA)"
            click.echo(plain(f"{site.file}:{site.line}: {site.api}{unsure}: {said}"))
    elif program.sites:
        _table(program, backends)
    for note in text.notes(program, backends):
        click.echo(plain(f"  {note}"))
    click.echo(text.last_line(program, backends))


def _table(program: Program, backends: tuple[Backend, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"refused": "red", "emulated": "yellow", "native": "green"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("API", overflow="fold")
    table.add_column("sites", justify="right")
    for backend in backends:
        table.add_column(backend)
    table.add_column("where", overflow="fold")
    for api, count, *verdicts, where in text.rows(program, backends):
        table.add_row(Text(plain(api)), count, *(Text(v, styles[v]) for v in verdicts), Text(plain(where)))
    width = None if on_terminal(sys.stdout) else 140
    console(highlight=False, width=width).print(table)
