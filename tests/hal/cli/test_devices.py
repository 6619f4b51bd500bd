# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import hal


def test_json_holds_the_facts_of_every_device(hal_command: Any) -> None:
    done = hal_command("devices", "--json", HAL_BACKENDS="cpu")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["schema"] == "hal.devices/1"
    (cpu,) = report["devices"]
    assert cpu["id"] == "cpu"
    assert set(cpu) == set(hal.DeviceInfo.__dataclass_fields__)


def test_the_table_in_a_pipe_is_plain_and_shows_what_is_unknown_as_a_dash(distributions: Any, hal_command: Any) -> None:
    distributions.stub("mychip")
    lines = hal_command("devices", HAL_BACKENDS="cpu,mychip").stdout.splitlines()
    assert lines[0].split() == ["ID", "VENDOR", "NAME", "ARCH", "MEMORY", "TORCH", "KIND"]
    assert lines[2].split() == ["mychip:0", "nobody", "-", "-", "-", "mychip:0", "real"]
    assert "\x1b" not in "".join(lines)


def test_a_broken_backend_is_told_on_stderr_and_the_rest_is_listed(distributions: Any, hal_command: Any) -> None:
    distributions.backend("mychip", "raise OSError('no driver')")
    done = hal_command("devices", "--json", HAL_BACKENDS="cpu,mychip")
    assert done.returncode == 0
    assert [device["id"] for device in json.loads(done.stdout)["devices"]] == ["cpu"]
    assert "mychip: BROKEN" in done.stderr
    assert "no driver" in done.stderr


def test_a_device_that_two_claim_is_told_on_stderr(distributions: Any, hal_command: Any) -> None:
    distributions.stub("one", torch_device="cuda:0")
    distributions.stub("two", torch_device="cuda:0", specificity="PRODUCT")
    done = hal_command("devices", HAL_BACKENDS="one,two")
    assert "two:0" in done.stdout
    assert "one:0" not in done.stdout
    assert "one:0: not listed: cuda:0 is two:0" in done.stderr


def test_a_name_from_a_driver_cannot_control_the_terminal() -> None:
    from hal.cli.devices import row

    info = hal.DeviceInfo("x:0", "x", "v", "evil\x1b[2J\nname", None, 2**31, "x:0")
    assert row(info)[2] == "evil?[2J?name"
    assert row(info)[4] == "2.0 GiB"


def test_an_allow_list_that_cannot_be_read_is_wrong_usage(hal_command: Any) -> None:
    done = hal_command("devices", HAL_BACKENDS="nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert "HAL_BACKENDS='nope'" in done.stderr


NOISE = """
import os, subprocess, sys
print("from Python")
os.write(1, b"from below\\n")
subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
"""


@pytest.mark.parametrize("where", ["while it is imported", "while it lists"])
def test_what_a_plugin_prints_does_not_mix_with_the_result(distributions: Any, hal_command: Any, where: str) -> None:
    distributions.stub("mychip")
    code = "from fake_dist_mychip import Stub\nclass Loud(Stub):\n    name = 'loud'\n    def discover(self):\n"
    if where == "while it lists":
        code += "        exec(NOISE)\n"
    code = f"NOISE = {NOISE!r}\n{code}        from hal import Absent\n        raise Absent('no', device='loud')\nbackend = Loud()\n"
    distributions.backend("loud", code + (NOISE if where == "while it is imported" else ""))
    done = hal_command("devices", "--json", HAL_BACKENDS="cpu,loud")
    assert [device["id"] for device in json.loads(done.stdout)["devices"]] == ["cpu"]
    for said in ("from Python", "from below", "from a child", "loud: absent: no"):
        assert said in done.stderr


def test_a_malformed_distribution_is_told_on_stderr(distributions: Any, hal_command: Any) -> None:
    distributions.malformed("bad")
    done = hal_command("devices", HAL_BACKENDS="cpu")
    assert done.returncode == 0
    assert "bad 1.0: its entry points cannot be read" in done.stderr


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("arguments", [("devices",), ("devices", "--json"), ("--help",), ("nope",)])
def test_a_stream_that_is_closed_is_no_fault(closed: str, arguments: tuple[str, ...]) -> None:
    redirections = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    command = f'exec "$0" -m hal.cli.main "$@" {redirections}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, *arguments], env={**os.environ, "HAL_BACKENDS": "cpu,cuda"}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == (2 if arguments == ("nope",) else 0), done.stderr
    assert "Traceback" not in done.stderr
