# SPDX-License-Identifier: Apache-2.0
"""The command as a user runs it: real processes, real exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hal_conformance.case import FAMILIES

HERE = Path(__file__).parent
HAL = [sys.executable, "-m", "hal.cli.main"]
# One thread: two workers of pytest, and the parent of each worker of ours, share few cores.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def hal(*arguments, cwd=HERE, env=ENVIRONMENT):
    command = [*HAL, "conformance", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


QUICK = ("--scale", "tiny", "--case", "combine.*[mixtral-8x7b]")
BROAD = ("--scale", "tiny", "--case", "*[ling-2.0-mini]", "--dtype", "bfloat16")


def test_a_run_prints_a_table_and_writes_every_form(tmp_path):
    files = [tmp_path / name for name in ("r.json", "r.xml", "r.md")]
    ran = hal("run", "--device", "cpu", *QUICK, "--json", files[0], "--junit", files[1], "--markdown", files[2])
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "verdict: agrees with the float64 oracle within every derived bound" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 100
    report = json.loads(files[0].read_text())
    assert report["schema"] == "hal.conformance/1"
    assert [(s["id"], s["impl"]) for s in report["subjects"]] == [("cpu", "torch")]
    assert report["subjects"][0]["contract"]["matmul"]["float32"]["accumulator_bits"] == 24
    assert sum(report["summary"].values()) == len(report["results"]) > 0
    keys = {"case", "subject", "impl", "dtype", "status", "margin", "detectors", "detail", "seconds"}
    assert all(keys <= row.keys() for row in report["results"])
    assert len(ET.parse(files[1]).findall(".//testcase")) == len(report["results"])
    assert "## cpu" in files[2].read_text()


def test_json_on_stdout_is_nothing_but_json():
    ran = hal("run", "--device", "cpu", *QUICK, "--dtype", "float32", "--json", "-")
    assert {row["dtype"] for row in json.loads(ran.stdout)["results"]} == {"float32"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_file_that_cannot_be_written_costs_no_other_result(tmp_path):
    ran = hal("run", "--device", "cpu", *QUICK, "--json", "/dev/full", "--junit", "x.xml", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "hal conformance: /dev/full: No space left on device\n"
    assert "verdict: agrees" in ran.stdout
    assert "<testsuite" in (tmp_path / "x.xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--device", "cpu", "--case", "no.such*"], 2, "no case matches 'no.such*'"),
        (["--device", "cpu", "--scale", "tiny", "--case", "trajectory.paired*"], 2, "nothing of it runs at scale tiny"),
        (["--device", "cpu", "--case", "fp8.uncast_e8m0", "--dtype", "float16"], 2, "at scale small in float16"),
        (["--device", "cpu", "--json", "folder/"], 2, "is no file name"),
        (["--device", "cpu", "--timeout", "nan"], 2, "'nan' is no number of seconds"),
        (["--device", "cpu", "--json", "a.json", "--junit", "no/../a.json"], 2, "go to the same file"),
        (["--device", "cpu", "--dtype", "int3"], 2, "int3"),
        (["--device", "cpu", "--nproc", "2"], 2, "no collective cases"),
        (["--device", "cpu", "--seed", "-1"], 2, "seed"),
        (["--device", "cpu", "--impl", "nocolon"], 2, "module:object"),
        (["--device", "cpu", "--impl", "no_such_module:x", *QUICK], 2, "ModuleNotFoundError"),
        (["--device", "cpu", "--json", "/no/such/folder/x.json"], 2, "there is no folder"),
        (["--device", "cpu", "--json", "x", "--junit", "x"], 2, "same file"),
        (["--device", "no-such-device", *QUICK], 3, "no-such-device"),
        (["--device", "cpu", "--require", "rocm:*", *QUICK], 3, "rocm:* is required"),
    ],
)
def test_wrong_usage_and_missing_devices_have_a_clear_line_and_their_status(arguments, status, words, tmp_path):
    ran = hal("run", *arguments, cwd=tmp_path)
    assert ran.returncode == status, ran.stderr
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["reversed", "split_k", "pairwise"])
def test_an_honest_implementation_passes_through_the_public_door(name):
    ran = hal("run", "--device", "cpu", "--impl", f"hal_conformance.faults:{name}", *BROAD, "--strict")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    "name",
    [
        "drops_a_token", "swaps_two_rows", "leaks_bias", "skips_renormalisation", "combines_in_bfloat16",
        "accumulates_in_bfloat16", "higher_index_first",
    ],
)  # fmt: skip
def test_a_wrong_implementation_is_flagged_through_the_public_door(name):
    ran = hal("run", "--device", "cpu", "--impl", f"hal_conformance.faults:{name}", *BROAD)
    assert ran.returncode == 1, ran.stdout
    assert "verdict: DOES NOT AGREE" in ran.stdout


def test_record_and_compare_need_the_device_only_once(tmp_path):
    for name in ("a", "b"):
        ran = hal("record", "--device", "cpu", "-o", tmp_path / f"{name}.safetensors", *QUICK)
        assert ran.returncode == 0, ran.stderr
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert a.read_bytes() == b.read_bytes()
    ran = hal("compare", a, b, cwd=tmp_path, env={**ENVIRONMENT, "HAL_BACKENDS": "none"})
    assert ran.returncode == 0, ran.stderr
    assert "manifests: no difference" in ran.stdout
    assert "outputs are bit-equal, 0 differ" in ran.stdout
    assert json.loads(hal("compare", a, "--json", "-").stdout)["schema"] == "hal.comparison/1"


@pytest.mark.parametrize("place", [0, 7, 8, 50, 200, 4000, -1])
def test_an_altered_file_is_refused_in_one_line_and_nothing_is_written(place, tmp_path, recorded):
    data = bytearray(recorded)
    data[place] ^= 4
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    ran = hal("compare", bad, "--json", tmp_path / "out.json")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1
    assert "bad.safetensors" in ran.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "r.safetensors"
    assert hal("record", "--device", "cpu", "-o", path, *QUICK).returncode == 0
    return path.read_bytes()


@pytest.mark.parametrize("data", [b"", b"hello", b"{}" * 5000, None])
def test_what_is_no_recording_is_refused_in_one_line(data, tmp_path):
    path = tmp_path / "x"
    if data is not None:
        path.write_bytes(data)
    ran = hal("compare", path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1


def test_recording_says_what_is_red_on_its_own_host(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from hal_conformance.portable import portable\n"
        "class Ops:\n"
        "    def __getattr__(self, name): return getattr(portable, name)\n"
        "    def experts(self, *given): return portable.experts(*given) * 1.5\n"
    )
    ran = hal("record", "--device", "cpu", "--impl", "mine:Ops", "-o", "x.st", "--case", "experts.random*", "--scale", "tiny",
              "--dtype", "float32", cwd=tmp_path)  # fmt: skip
    assert ran.returncode == 0
    recorded, red = ran.stderr.splitlines()
    assert recorded.startswith("recorded ")
    assert red.endswith("of them are red on this host, the first experts.random[ling-lite] float32")


def test_recording_an_absent_device_leaves_no_file(tmp_path):
    ran = hal("record", "--device", "cuda:9", "-o", tmp_path / "x", *QUICK)
    assert ran.returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_list_and_explain_describe_the_cases():
    cases = json.loads(hal("list", "--json").stdout)["cases"]
    assert {case["family"] for case in cases} == set(FAMILIES)
    table = hal("list").stdout
    assert all(case["name"] in table for case in cases)
    assert max(map(len, table.splitlines())) <= 100
    explained = hal("explain", f"{cases[0]['name']}[mixtral-8x7b]")
    assert explained.returncode == 0
    assert cases[0]["what"].split()[0] in explained.stdout
    near = hal("explain", "router.topkset")
    assert near.returncode == 2
    assert "router." in near.stderr


def test_the_current_folder_is_searched_for_the_implementation_only(tmp_path):
    for name in ("numpy", "json", "hal_cpu"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')\n")
    (tmp_path / "mine.py").write_text("from hal.moe.torch_ops import torch_ops\nimport beside\nops = torch_ops\n")
    (tmp_path / "beside.py").write_text("")
    hal_script = Path(sys.executable).with_name("hal")
    command = [str(hal_script), "conformance", "run", "--device", "cpu", "--impl", "mine:ops", *QUICK]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_shown_on_a_terminal_only():
    parent, child = pty.openpty()
    command = [*HAL, "conformance", "run", "--device", "cpu", *QUICK]
    environment = {**os.environ, "TERM": "xterm"}
    ran = subprocess.Popen(command, stderr=child, stdout=subprocess.DEVNULL, env=environment)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := os.read(parent, 1 << 16):
            shown += chunk
    os.close(parent)
    assert ran.wait(timeout=300) == 0
    assert b" left " in shown


def test_the_command_imports_neither_torch_nor_numpy():
    code = "import sys, hal_conformance.cli; assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_comparison_never_overwrites_a_recording(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"recorded far away")
    ran = hal("compare", file, "--json", file)
    assert ran.returncode == 2
    assert "is one of the recordings" in ran.stderr
    assert file.read_bytes() == b"recorded far away"


def test_a_recording_of_scale_small_has_at_most_5_mb(tmp_path):
    path = tmp_path / "small.safetensors"
    ran = hal("record", "--device", "cpu", "--scale", "small", "-o", path)
    assert ran.returncode == 0, ran.stderr
    assert path.stat().st_size <= 5_000_000
