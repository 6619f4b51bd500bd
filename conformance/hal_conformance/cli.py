# SPDX-License-Identifier: Apache-2.0
"""`hal conformance`. Only click is imported here, so that `hal --help` stays quick."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hal.cli.output import say

if TYPE_CHECKING:
    from hal_conformance.execution.plan import Selection, Task

F = TypeVar("F", bound=Callable[..., Any])

DASH = Path("-")


@click.group()
def conformance() -> None:
    """Prove that MoE numerics agree across devices, or name what does not.

    Exit status: 0 something was judged and nothing is red; 1 something is red, or nothing was judged; 2 wrong usage,
    or a file that is unreadable or altered; 3 a named or required device is absent or broken.
    """
    # The oracle multiplies many small matrices, for which numpy's threads wait for each other more than they
    # compute: a judging process on two cores took 31 s with them and 12 s without. Read when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Seconds(click.FloatRange):
    """A time that passes: comparisons with NaN are false, and it would pass for one that is in the range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return number


def _selection_options(function: F) -> F:
    """Add the options that select cases."""
    options = [
        click.option("--case", "cases", multiple=True, metavar="GLOB", help="Only these; * and ? are special."),
        click.option(
            "--dtype", "dtypes", multiple=True, type=click.Choice(("float32", "bfloat16", "float16")), help="Only this."
        ),
        click.option(
            "--scale", type=click.Choice(("tiny", "small", "full")), default="small", show_default=True,
            help="Size of the shapes; full has the published ones.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of every input."),
        click.option(
            "--timeout", type=Seconds(min=0, min_open=True), envvar="HAL_CONFORMANCE_TIMEOUT",
            metavar="SECONDS", help="For one case; by scale if not given.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _errors_to_status(function: F) -> F:
    """Turn our errors into one message on stderr and the exit status of the design."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from hal.errors import DeviceError, HalError

        try:
            return function(*args, **kwargs)
        except DeviceError as error:
            _fail(str(error), 3)
        except HalError as error:
            _fail(str(error), 2)
        except BrokenPipeError:  # `| head`
            raise
        except OSError as error:
            _fail(f"{error.filename or 'an output'}: {error.strerror or error}", 2)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written", 130)

    return wrapped  # type: ignore[return-value]


def _fail(message: str, status: int) -> None:
    from hal_conformance.text import plain

    lines = [plain(line) for line in message.splitlines() if line.strip()]
    say("\n  ".join(["hal conformance: " + (lines[0] if lines else ""), *lines[1:]]))
    sys.exit(status)


def _tasks(selection: Selection) -> list[Task]:
    from hal_conformance.execution.plan import Catalogue, plan

    return plan(selection, Catalogue().all())


def _selection(cases: tuple[str, ...], dtypes: tuple[str, ...], scale: Any, seed: int) -> Selection:
    from hal_conformance.execution.plan import Selection

    return Selection(cases, dtypes, scale, seed)


def _publish(outputs: dict[Path | None, Callable[[], bytes]], show: Callable[[], None]) -> None:
    """Write the files that were asked for; `-` is stdout, which has what `show` prints if no file is written there.

    What can be written is, before one that cannot ends the program: a run may have taken hours.
    """
    from hal_conformance import atomic

    failed = []
    for path, make in outputs.items():
        if path is not None and path != DASH:
            try:
                atomic.write(path, make())
            except OSError as error:
                failed.append(f"{path}: {error.strerror or error}")
    if DASH in outputs:
        sys.stdout.buffer.write(outputs[DASH]())
    else:
        show()
    if failed:
        _fail("\n".join(failed), 2)


def _check_outputs(*paths: Path | None) -> None:
    from hal.errors import ConfigError
    from hal_conformance import atomic

    given = [path for path in paths if path is not None]
    files = [path for path in given if path != DASH]
    for path in files:
        atomic.check_writable(path)
    pairs = itertools.combinations(files, 2)
    if len(given) > len(files) + 1 or any(atomic.same(*pair) for pair in pairs):
        raise ConfigError("two outputs go to the same file")


class _OutputFile(click.Path):
    """A file that is written; `Path` would drop the slash that says that a folder is meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if not str(value) or str(value).endswith(("/", os.sep)):
            self.fail(f"{str(value)!r} is no file name", param, ctx)
        return super().convert(value, param, ctx)


_file = _OutputFile(path_type=Path, dir_okay=False)


@conformance.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_errors_to_status
def list_(as_json: bool) -> None:
    """List the cases."""
    from hal_conformance.report import listing

    listing.show_cases(as_json=as_json)


@conformance.command()
@click.argument("case")
@_errors_to_status
def explain(case: str) -> None:
    """Say what CASE checks, and where its bound comes from."""
    from hal_conformance.report import listing

    listing.explain(case)


@conformance.command()
@click.option("--device", "devices", multiple=True, metavar="D", help="As cpu or cuda:0; all: simulated ones, too.")
@click.option("--require", "required", multiple=True, metavar="GLOB", help="Exit 3 unless such a device was judged.")
@click.option("--impl", "impls", multiple=True, metavar="M:O", help="An implementation of operators, module:object.")
@_selection_options
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of a collective.")
@click.option("--json", "json_file", type=_file, help="Write the results as JSON; - is stdout.")
@click.option("--junit", "junit_file", type=_file, help="Write JUnit XML.")
@click.option("--markdown", "markdown_file", type=_file, help="Write a Markdown summary.")
@click.option("--strict", is_flag=True, help="Amber fails, too.")
@_errors_to_status
def run(
    devices: tuple[str, ...], required: tuple[str, ...], impls: tuple[str, ...], cases: tuple[str, ...],
    dtypes: tuple[str, ...], scale: str, seed: int, timeout: float | None, nproc: int, json_file: Path | None,
    junit_file: Path | None, markdown_file: Path | None, strict: bool,
) -> None:  # fmt: skip
    """Run the suite on devices, or on an implementation of your own.

    Without --device: every real device that opens here, and sim:h200 and sim:mi300x beside them.
    """
    from hal.cli.output import stdout_for_results
    from hal.errors import ConfigError
    from hal_conformance import suite
    from hal_conformance.execution.subject import choose
    from hal_conformance.report import table
    from hal_conformance.report.document import to_json
    from hal_conformance.report.junit import junit
    from hal_conformance.report.markdown import markdown
    from hal_conformance.report.progress import Bar
    from hal_conformance.text import plain

    if nproc != 1:
        raise ConfigError(f"--nproc {nproc}: this version has no collective cases", expected="--nproc 1")
    _check_outputs(json_file, junit_file, markdown_file)
    selection = _selection(cases, dtypes, scale, seed)
    tasks = _tasks(selection)
    with stdout_for_results():
        found, silent = suite.listed() if not devices or "all" in devices else ([], [])
    subjects = choose(devices, impls, found)
    with Bar(len(tasks) * len(subjects)) as bar:
        report = suite.run(
            subjects, tasks, selection, required=required, case_s=timeout,
            on_result=lambda subject, row: bar.advance(row.case, red=row.status.colour == "red"),
            on_not_run=lambda entry: bar.advance(f"{entry.subject} {entry.kind}", by=len(tasks)),
        )  # fmt: skip
    report.not_run += silent
    files: dict[Path | None, Callable[[], bytes]] = {
        json_file: lambda: to_json(report.as_json()),
        junit_file: lambda: junit(report, strict=strict),
        markdown_file: lambda: markdown(report),
    }
    _publish(files, lambda: table.show(report, table.console(), strict=strict))
    for entry in report.not_run:
        if entry.failed:
            say(f"hal conformance: {plain(f'{entry.subject}: {entry.kind}: {entry.reason}')}")
    for glob in report.required_missing:
        say(f"hal conformance: {plain(glob)} is required, and no such device was judged")
    sys.exit(report.exit_status(strict=strict))


@conformance.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--case", "cases", multiple=True, metavar="GLOB", help="Only cases of this name or family, or `name[preset]`."
)
@click.option("--scale", type=click.Choice(("tiny", "small")), default="tiny", show_default=True, help="Of the shapes.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of every input.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1, 64), default=lambda: max(1, (os.cpu_count() or 1) // 2),
    show_default="half the processors", help="Processes that judge, each with one that computes.",
)  # fmt: skip
@click.option("--json", "json_file", type=_file, help="Write the outcomes as JSON; - is stdout.")
@click.option("--markdown", "markdown_file", type=_file, help="Write the matrix as Markdown.")
@_errors_to_status
def selfcheck(
    names: tuple[str, ...], cases: tuple[str, ...], scale: Any, seed: int, jobs: int, json_file: Path | None,
    markdown_file: Path | None,
) -> None:  # fmt: skip
    """Run faults that the suite must flag, and benign variations that it must not.

    NAME: some of them, as globs; all without. Exit status 1 if one is not what it should be.
    """
    from fnmatch import fnmatchcase

    from hal.errors import ConfigError
    from hal_conformance import selfcheck as checking
    from hal_conformance import selfcheck_table
    from hal_conformance.execution.plan import Catalogue
    from hal_conformance.faults import VARIATIONS
    from hal_conformance.report.document import to_json
    from hal_conformance.report.progress import Bar
    from hal_conformance.report.table import console
    from hal_conformance.text import plain

    _check_outputs(json_file, markdown_file)
    unknown = [glob for glob in names if not any(fnmatchcase(name, glob) for name in VARIATIONS)]
    if unknown:
        raise ConfigError(f"no fault or benign variation matches {plain(unknown[0])!r}")
    chosen = [v for n, v in VARIATIONS.items() if not names or any(fnmatchcase(n, glob) for glob in names)]
    chosen.sort(key=checking.place)
    selection = _selection(cases, (), scale, seed)
    tasks = {variation: checking.tasks(selection, Catalogue().all(), variation) for variation in chosen}
    started = time.monotonic()
    with Bar(sum(map(len, tasks.values()))) as bar:
        outcomes = checking.run(
            tasks, selection, jobs=jobs,
            on_outcome=lambda o: bar.advance(o.variation.name, red=not o.right, by=len(tasks[o.variation])),
        )  # fmt: skip
    seconds = time.monotonic() - started
    files: dict[Path | None, Callable[[], bytes]] = {
        json_file: lambda: to_json(checking.as_json(outcomes, selection, seconds)),
        markdown_file: lambda: selfcheck_table.markdown(outcomes, selection, seconds),
    }
    _publish(files, lambda: selfcheck_table.show(outcomes, console()))
    sys.exit(checking.exit_status(outcomes))


@conformance.command()
@click.option("--device", required=True, metavar="D", help="The device to record.")
@click.option("-o", "--output", required=True, type=_file, metavar="FILE", help="A safetensors file to write.")
@click.option("--impl", default="torch", metavar="M:O", help="An implementation of operators, module:object.")
@_selection_options
@_errors_to_status
def record(
    device: str, output: Path, impl: str, cases: tuple[str, ...], dtypes: tuple[str, ...], scale: str, seed: int,
    timeout: float | None,
) -> None:  # fmt: skip
    """Record what a device returns, to be judged elsewhere by `compare`."""
    from hal.errors import ConfigError
    from hal_conformance import atomic, suite
    from hal_conformance.execution.plan import Catalogue
    from hal_conformance.execution.subject import choose
    from hal_conformance.recordings import recording
    from hal_conformance.report.progress import Bar
    from hal_conformance.text import plain

    if device == "all" or output == DASH:
        raise ConfigError("a recording has one device, and goes to a file")
    atomic.check_writable(output)
    selection = _selection(cases, dtypes, scale, seed)
    tasks = _tasks(selection)
    (subject,) = choose([device], [impl], [])
    with Bar(len(tasks)) as bar:
        data, seen = suite.record(
            subject, tasks, selection, case_s=timeout, on_observation=lambda o: bar.advance(o.task.name)
        )
    judged = [(e, e.claim) for e in recording.parse(data, output.name, Catalogue()).entries if e.claim is not None]
    atomic.write(output, data)
    without = sum(o.status is not None for o in seen)
    done = f"recorded {len(seen) - without} results of {plain(device)} ({without} without outputs)"
    say(f"{done}, {len(data)} bytes")
    for colour in ("red", "amber"):
        those = [entry.task for entry, claim in judged if claim.status.colour == colour]
        if those:
            say(f"{len(those)} of them are {colour} on this host, the first {plain(those[0])}")
    sys.exit(0 if len(seen) > without else 1)


@conformance.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option(
    "--group-by", metavar="FACT", help="Name the odd one out: driver, device, host, or a fact such as versions.torch."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1, max=64),
    default=lambda: min(4, os.cpu_count() or 1),
    show_default="the processors, at most 4",
    help="Processes that compute.",
)
@click.option("--json", "json_file", type=_file, help="Write the comparison as JSON; - is stdout.")
@click.option("--strict", is_flag=True, help="Amber fails, too.")
@_errors_to_status
def compare(files: tuple[Path, ...], group_by: str | None, jobs: int, json_file: Path | None, strict: bool) -> None:
    """Judge recordings against the oracle and against each other; no device is needed."""
    from hal_conformance.execution.plan import Catalogue
    from hal_conformance.recordings import compare as comparing
    from hal_conformance.recordings import comparison_table, recording
    from hal_conformance.recordings.bundle import Unreadable
    from hal_conformance.report.document import to_json
    from hal_conformance.report.progress import Bar
    from hal_conformance.report.table import console
    from hal_conformance.text import plain

    _check_outputs(json_file)
    if json_file is not None and json_file.exists() and any(f.exists() and f.samefile(json_file) for f in files):
        _fail(f"{json_file} is one of the recordings; the comparison would overwrite it", 2)
    try:
        recordings = [recording.read(path, Catalogue()) for path in files]
        with Bar(max(len(r.entries) for r in recordings)) as bar:
            few = sum(len(r.entries) for r in recordings) < 200
            found = comparing.compare(recordings, bar.advance, group_by=group_by, processes=1 if few else jobs)
    except Unreadable as error:
        _fail(str(error), 2)
    files_out: dict[Path | None, Callable[[], bytes]] = {json_file: lambda: to_json(found.as_json())}
    _publish(files_out, lambda: comparison_table.show(found, console(), strict=strict))
    for label in found.unjudged():
        say(f"hal conformance: {plain(label)}: nothing of it could be judged")
    for label in found.odd():
        say(f"hal conformance: {plain(label)} is not like the others of its group, and nothing says why")
    sys.exit(found.exit_status(strict=strict))
