# SPDX-License-Identifier: Apache-2.0
"""`hal doctor`: what works here, what does not, why, and what to do. Works when `import torch` does not."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

import hal
from hal import plugins
from hal.autoload import AUTOLOAD
from hal.cli.output import on_terminal, plain
from hal.errors import ConfigError
from hal.explanation import TIMEOUT_S, Explanation, explain

if TYPE_CHECKING:
    from hal.cli.torch_import import TorchState

SCHEMA = "hal.doctor/1"
VARIABLES = ("HAL_BACKENDS", "HAL_DEVICE", AUTOLOAD)
DISTRIBUTIONS = ("torch", "numpy", "ml_dtypes", "safetensors", "click", "rich", "psutil")


@click.command(short_help="Say what works here, what does not, and why.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=TIMEOUT_S, show_default=True,
    metavar="S", help="Seconds that one child process may take.",
)  # fmt: skip
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, timeout_s: float) -> None:
    """Open every backend in a child process and say whether it is found, absent or broken, and why.

    Also tells the versions, and whether `import torch` works with the plug-ins that it loads by itself. Exit
    status 3 if something is broken, otherwise 0; hardware that is absent is no fault.
    """
    environment = {name: os.environ.get(name) for name in VARIABLES}
    environment[AUTOLOAD] = getattr(ctx.obj, "autoload", environment[AUTOLOAD])
    with _progress():
        report = examine(timeout_s, environment)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        report.print()
    ctx.exit(0 if report.healthy() else 3)


class Report:
    """What doctor found.

    Attributes:
        versions: of Python, hal and what it needs; None is not installed.
        environment: variables as the user has them.
        torch: what became of `import torch`.
        backends: one explanation each.
        problems: what is wrong beyond single backends.
    """

    def __init__(
        self, versions: dict[str, str | None], environment: dict[str, str | None], torch: TorchState,
        backends: list[Explanation], problems: list[str],
    ) -> None:  # fmt: skip
        self.versions = versions
        self.environment = environment
        self.torch = torch
        self.backends = backends
        self.problems = problems

    def healthy(self) -> bool:
        """Return whether nothing is broken."""
        return not self.problems and all(answer.status != "broken" for answer in self.backends)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "schema": SCHEMA,
            "healthy": self.healthy(),
            "versions": self.versions,
            "environment": self.environment,
            "torch": self.torch.as_json(),
            "backends": [answer.as_json() for answer in self.backends],
            "problems": self.problems,
        }

    def print(self) -> None:
        """Write it for people."""
        for answer in self.backends:
            _print_backend(answer)
        click.echo()
        for name, version in self.versions.items():
            click.echo(f"{name:12} {version or 'not installed'}")
        for name, value in self.environment.items():
            if value is not None:
                click.echo(f"{name}={plain(value)}")
        for plugin in self.torch.plugins:
            click.echo(f"`import torch` loads {plugin.name} ({plugin.value} of {plugin.owner})")
        click.echo()
        for problem in self.problems:
            click.secho(plain(problem, indent=0), fg="red")
        broken = [answer.backend for answer in self.backends if answer.status == "broken"]
        if broken:
            click.secho(f"Broken: {', '.join(broken)}.", fg="red")
        if self.healthy():
            click.secho("Nothing is broken.", fg="green")


COLOURS = {"found": "green", "absent": "white", "broken": "red"}


def _print_backend(answer: Explanation) -> None:
    click.secho(f"{answer.status:8}", fg=COLOURS[answer.status], nl=False)
    reason = answer.reason.removeprefix(f"{answer.backend}: ")
    click.echo(f"{answer.backend:10} {plain(reason, indent=19)}")
    for info in answer.devices:
        click.echo(f"{'':19}{plain(info.id)}: {plain(info.name or info.vendor)} ({plain('; '.join(info.evidence))})")
    for note in (*answer.left, *answer.advice):
        click.echo(f"{'':19}{plain(note, indent=19)}")
    if answer.detail and answer.status == "broken":
        last = answer.detail.strip().splitlines()[-1]
        if last not in answer.reason:
            click.echo(f"{'':19}{plain(last)}")
    click.echo(f"{'':19}from {plain(', '.join(answer.owners))}")


def examine(timeout_s: float, environment: dict[str, str | None]) -> Report:
    """Examine everything. Never raises for what it finds."""
    from hal.cli import torch_import

    problems = list(plugins.unreadable())
    try:
        admitted = plugins.allowed()
    except ConfigError as error:
        problems.append(str(error))
        admitted = plugins.registered()
    state = torch_import.examine(timeout_s)
    problems += state.problems()
    answers = explain(timeout_s=timeout_s, admitted=admitted)
    problems += _device_problems(environment["HAL_DEVICE"], answers)
    return Report(_versions(state), environment, state, answers, problems)


def _device_problems(wanted: str | None, answers: list[Explanation]) -> list[str]:
    if wanted in (None, "auto"):
        return []
    of_that_name = [answer for answer in answers if answer.backend == str(wanted).partition(":")[0]]
    if not of_that_name:
        known = ", ".join(sorted(answer.backend for answer in answers))
        return [f"HAL_DEVICE={wanted} names no backend\n  expected: one of: {known}, or auto\n  try: unset HAL_DEVICE"]
    answer = of_that_name[0]
    ids = {info.id for info in answer.devices}
    if answer.status == "found" and (":" not in str(wanted) or wanted in ids or f"{answer.backend}:0" == wanted):
        return []
    what = f"{answer.backend} is {answer.status}" if answer.status != "found" else f"there is only {', '.join(ids)}"
    return [f"HAL_DEVICE={wanted} cannot be opened: {what}\n  try: unset HAL_DEVICE"]


def _versions(state: TorchState) -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "hal": hal.__version__,
    }
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    if state.version is not None:
        versions["torch"] = state.version
    return versions


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    if not on_terminal(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("opening every backend in a process of its own"):
        yield
