# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hal


def command(distributions: Any, name: str, code: str, *, dist: str | None = None, value: str = "run") -> None:
    dist = dist or f"commands-{name}"
    module = "fake_" + dist.replace("-", "_")
    distributions.add(module, code, {"hal.commands": {name: f"{module}:{value}"}}, dist=dist)


def raising(statement: str) -> str:
    return f"import click\nfrom hal.errors import *\n@click.command(help='Does it.')\ndef run():\n    {statement}\n"


def test_the_version_is_the_librarys(hal_command: Any) -> None:
    done = hal_command("--version")
    assert (done.returncode, done.stdout) == (0, f"hal, version {hal.__version__}\n")


def test_a_command_of_another_package_is_listed_and_runs(distributions: Any, hal_command: Any) -> None:
    command(distributions, "mine", raising("click.echo('it ran')"))
    assert "mine" in hal_command("--help").stdout
    done = hal_command("mine")
    assert (done.returncode, done.stdout) == (0, "it ran\n")


def test_what_a_plug_in_says_does_not_control_the_terminal(distributions: Any, hal_command: Any) -> None:
    command(distributions, "mine", "raise OSError('\\x1b[31mred\\r')")
    for arguments in (("--help",), ("mine",)):
        done = hal_command(*arguments)
        assert "?[31mred" in done.stdout + done.stderr
        assert not {"\x1b", "\r"} & set(done.stdout + done.stderr)


def test_a_command_that_cannot_be_imported_is_listed_as_broken_and_stops_no_other(
    distributions: Any, hal_command: Any
) -> None:
    command(distributions, "mine", "raise OSError('lost a library')")
    listed = hal_command("--help")
    assert listed.returncode == 0
    assert "(broken)" in listed.stdout
    assert "doctor" in listed.stdout
    assert hal_command("backend", "--help").returncode == 0
    for arguments in (("mine",), ("mine", "--help"), ("mine", "sub", "--option", "1")):
        done = hal_command(*arguments)
        assert done.returncode == 3
        assert "lost a library" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_what_a_commands_module_prints_while_it_is_imported_does_not_mix_with_results(
    distributions: Any, hal_command: Any
) -> None:
    command(distributions, "mine", "print('loud')\n" + raising("click.echo('it ran')"))
    done = hal_command("mine")
    assert (done.stdout, "loud" in done.stderr) == ("it ran\n", True)


def test_a_command_that_raises_no_ordinary_exception_is_broken(distributions: Any, hal_command: Any) -> None:
    command(distributions, "mine", "raise BaseException('as a panic of another language is')")
    assert hal_command("--help").returncode == 0
    done = hal_command("mine")
    assert (done.returncode, "as a panic" in done.stderr) == (3, True)


def test_a_malformed_distribution_does_not_stop_the_others(distributions: Any, hal_command: Any) -> None:
    distributions.malformed("bad")
    listed = hal_command("--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "doctor" in listed.stdout


def test_a_command_that_is_no_click_command_is_broken(distributions: Any, hal_command: Any) -> None:
    command(distributions, "mine", "run = 42")
    done = hal_command("mine")
    assert done.returncode == 3
    assert "is a int" in done.stderr


def test_two_owners_of_one_command_are_refused_and_named(distributions: Any, hal_command: Any) -> None:
    for dist in ("first", "second"):
        command(distributions, "mine", raising("click.echo('it ran')"), dist=dist)
    done = hal_command("mine")
    assert done.returncode == 3
    assert "first 1.0" in done.stderr
    assert "second 1.0" in done.stderr
    assert "it ran" not in done.stdout


def test_errors_become_messages_with_a_status_and_tracebacks_only_on_request(
    distributions: Any, hal_command: Any
) -> None:
    cases = {
        "raise Absent('no card', device='x')": 3,
        "raise Broken('dead', device='x')": 3,
        "raise UnknownDevice('who', device='x')": 3,
        "raise DuplicateBackend('two')": 3,
        "raise ConfigError('wrong', hint='right')": 2,
        "raise UnsupportedDtype('no fp4', device='x', what='fp4')": 1,
        "raise ZeroDivisionError('a bug')": 70,
        "raise SystemExit(5)": 5,
        "raise click.UsageError('how?')": 2,
    }
    for number, statement in enumerate(cases):
        command(distributions, f"mine{number}", raising(statement))
    for number, (statement, status) in enumerate(cases.items()):
        done = hal_command(f"mine{number}")
        assert done.returncode == status, statement
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert "try: right" in hal_command("mine4").stderr
    assert "Traceback" in hal_command("--debug", "mine0").stderr
    assert "Traceback" in hal_command("mine6", HAL_DEBUG="1").stderr


def test_commands_run_with_torchs_autoload_off(distributions: Any, hal_command: Any) -> None:
    command(distributions, "mine", "import os\n" + raising("click.echo(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"))
    assert hal_command("mine", TORCH_DEVICE_BACKEND_AUTOLOAD="1").stdout == "0\n"


def test_a_reader_that_goes_away_gets_no_traceback(distributions: Any) -> None:
    command(distributions, "mine", raising("[click.echo('x' * 1000) for _ in range(1000)]"))
    with subprocess.Popen(
        [sys.executable, "-m", "hal.cli.main", "mine"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
    assert errors == b""
    assert process.returncode == 141  # neither 0 nor a finding


def test_a_reader_that_was_never_there_and_a_full_disk_are_told_at_the_end(distributions: Any) -> None:
    command(distributions, "mine", "import sys\n" + raising("(sys.stdout.write('x'), sys.exit(0))"))
    program = [sys.executable, "-m", "hal.cli.main", "mine"]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, env=os.environ, check=False)
    os.close(write)
    assert (gone.returncode, gone.stderr) == (141, b"")
    with open("/dev/full", "w") as full:  # noqa: PTH123  a device
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, env=os.environ, check=False)
    assert (done.returncode, done.stderr) == (2, b"hal: an output: No space left on device\n")


@pytest.mark.parametrize("arguments", [("devices",), ("conformance", "list"), ("conformance", "explain", "norm.rms")])
def test_tables_are_no_exception(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "hal.cli.main", *arguments], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_message_that_cannot_be_told_changes_no_status(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "hal.cli.main"]
    with open("/dev/full", "w") as full:  # noqa: PTH123  a device
        for arguments, stdout in (
            (["nope"], None),
            (["conformance", "compare", "nope"], None),
            (["doctor", "--json"], full),
        ):
            done = subprocess.run([*program, *arguments], stdout=stdout, stderr=full, cwd=tmp_path, check=False)
            assert done.returncode == 2, arguments


def test_an_unknown_command_is_wrong_usage(hal_command: Any) -> None:
    done = hal_command("nope")
    assert (done.returncode, "No such command" in done.stderr) == (2, True)
