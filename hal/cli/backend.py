# SPDX-License-Identifier: Apache-2.0
"""`hal backend`: write a plug-in for a new device, and say which parts of the interface it fulfils."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from hal.check import Finding
from hal.cli.output import plain, say
from hal.errors import Absent, Broken
from hal.explanation import TIMEOUT_S

SCHEMA = "hal.backend-check/1"


@click.group(short_help="Write a plug-in for a new device, and check it.")
def backend() -> None:
    """Write a plug-in for a new device, and check it."""


@backend.command()
@click.argument("name")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path(), show_default="here",
    help="Folder in which the package's own folder is made.",
)  # fmt: skip
@click.option(
    "--torch-type", metavar="T", help="The torch device type; the name by default, cpu for a rehearsal on the host."
)
def new(name: str, folder: Path, torch_type: str | None) -> None:
    """Write a complete plug-in package for backend NAME: project file, module, test. Overwrites nothing."""
    from hal.scaffold import write_package

    made = write_package(name, folder, torch_type or name)
    click.echo(made)
    say(f"Next: pip install -e '{made}', then hal backend check {name}")


@backend.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=TIMEOUT_S, show_default=True,
    metavar="S", help="Seconds that the whole check may take.",
)  # fmt: skip
@click.pass_context
def check(ctx: click.Context, name: str, as_json: bool, timeout_s: float) -> None:
    """Try every part of the interface on backend NAME's first device, in a process of its own.

    Each part is fulfilled, unsupported (the backend says that it lacks it, and why) or fails (it does something
    else than the interface says). Exit status 1 if a part fails, 3 if there is no device that opens, otherwise 0.
    In JSON, "status" is then "absent" or "broken" with the reason, otherwise "checked".
    """
    from hal.check import check_backend

    try:
        findings = check_backend(name, timeout_s=timeout_s)
    except (Absent, Broken) as error:
        if as_json:
            click.echo(_as_json(name, "absent" if isinstance(error, Absent) else "broken", error.reason, []))
        raise
    failed = any(finding.outcome == "fails" for finding in findings)
    counts = Counter(finding.outcome for finding in findings)
    if as_json:
        click.echo(_as_json(name, "checked", "", findings))
    else:
        colours = {"fulfilled": "green", "unsupported": "yellow", "fails": "red"}
        for finding in findings:
            click.secho(f"{finding.outcome:12}", fg=colours[finding.outcome], nl=False)
            click.echo(f"{finding.part:24}{plain(finding.detail)}")
    say(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    ctx.exit(1 if failed else 0)


def _as_json(name: str, status: str, reason: str, findings: list[Finding]) -> str:
    report = {"schema": SCHEMA, "backend": name, "status": status, "reason": reason,
              "findings": [finding.as_json() for finding in findings]}  # fmt: skip
    return json.dumps(report, indent=2)
