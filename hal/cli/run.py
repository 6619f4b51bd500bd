# SPDX-License-Identifier: Apache-2.0
"""`hal run`: a program that was written for CUDA, unchanged, on another device."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import hal
from hal.errors import ConfigError
from hal.launch.ranks import OPTIONS, check, launch
from hal.launch.settings import Settings

if TYPE_CHECKING:
    from hal.cli.main import Invocation

F = TypeVar("F", bound=Callable[..., Any])


def _torchrun_options(function: F) -> F:
    """Add torchrun's options, as texts that are passed on."""
    for name in reversed(OPTIONS):
        function = click.option(f"--{name}", hidden=name not in _SHOWN, help=_SHOWN.get(name))(function)
    return function


_SHOWN = {
    "nnodes": "Hosts of this run; this and the next ones are torchrun's, which has more of them.",
    "node-rank": "Which of the hosts this is.",
    "rdzv-backend": "How the hosts find each other.",
    "rdzv-endpoint": "Where they do, as HOST:PORT.",
    "max-restarts": "How often a failed group is started anew.",
}


@click.command(
    short_help="Run a program written for CUDA on another device.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--device", "-d", help="As `hal devices` lists it; a backend's name gives all of its devices. "
              "[default: HAL_DEVICE, or the first accelerator, or the CPU]")  # fmt: skip
@click.option("--nproc", type=click.IntRange(min=1), help="Processes on this host, started by torchrun's own engine.")
@click.option("--strict", is_flag=True, help="Refuse whatever may change results, naming the line.")
@click.option("--report", type=click.Path(dir_okay=False), help="Write what was redirected to this file, as JSON.")
@click.option("--module", "-m", is_flag=True, help="SCRIPT is the name of a module, as for `python -m`.")
@click.option("--code", "-c", is_flag=True, help="SCRIPT is Python code itself, as for `python -c`.")
@_torchrun_options
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(
    invocation: Invocation, /, device: str | None, nproc: int | None, strict: bool, report: str | None, module: bool,
    code: bool, script: str, arguments: tuple[str, ...], **torchrun: str | None,
) -> None:  # fmt: skip
    """Run SCRIPT with its ARGUMENTS. It sees a working torch.cuda, which really is the device.

    SCRIPT is what Python takes: a file, a folder or an archive with a __main__.py, or - for standard input.

    The program is run by plain Python, which replaces this process: its arguments, its standard streams, its signals
    and its exit status are its own. Options end at SCRIPT. Without a device, and with one that torch itself calls
    CUDA, nothing is changed. Exit status: the program's; 2 or 3 only before it starts.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in torchrun.items() if value is not None]
    several = nproc is not None or bool(options)
    if module and code:
        raise ConfigError("SCRIPT is the name of a module (-m) or code (-c), not both")
    if several and (code or script == "-"):
        raise ConfigError("several processes cannot share code that is in no file", expected="a script, or -m")
    if not (module or code or script == "-" or Path(script).exists()):
        raise ConfigError(f"there is no file {script!r}", expected="a Python script, or -m and the name of a module")
    if not (code or script == "-"):
        _say_hidden(Path() if module else Path(script).parent)
    if report is not None:
        _try(Path(report).absolute())
    if several:
        check(device, nproc or 1)
    settings = Settings(
        device=device, strict=strict, report=None if report is None else str(Path(report).absolute()),
        folder=tempfile.mkdtemp(prefix="hal-run-"), command=tuple(sys.argv[1:]), autoload=invocation.autoload,
    )  # fmt: skip
    command = [*(["-m"] if module else ["-c"] if code else []), script, *arguments]
    if several:
        sys.exit(launch(settings, nproc or 1, options, command))
    environment = dict(os.environ)
    settings.into(environment, first=os.getpid())
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed, as by `>&-`
            stream.flush()
    os.execve(sys.executable, [sys.executable, *command], environment)


def _say_hidden(folder: Path) -> None:
    """Warn of a module of the program's own that has this package's name: the program would import this package."""
    for own in (folder / "hal.py", folder / "hal" / "__init__.py"):
        if own.exists() and own.resolve() != Path(hal.__file__).resolve():
            click.echo(f"hal run: {own} has the name of this package: who imports it gets this package", err=True)


def _try(report: Path) -> None:
    """Find out now, and not after hours of training, whether the report can be written; leave the file as it was.

    Raises:
        ConfigError: it cannot.
    """
    new = not report.exists()
    try:
        report.open("a").close()
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}", hint="a file in a folder of yours") from error
    if new:
        report.unlink()
