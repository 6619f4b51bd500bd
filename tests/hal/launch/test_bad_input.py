# SPDX-License-Identifier: Apache-2.0
"""Programs that end badly, and those that kill them: as under plain Python and torchrun, with one clear message."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest

HAL = str(Path(sys.executable).parent / "hal")


def run(command, folder, **environment):
    """Run a command to its end, in a folder."""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=240, input="print(6 * 7)",
                          env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment})  # fmt: skip


def told(errors):
    """Return stderr without our own lines at its end, and without the interpreter's path."""
    return re.sub(r"^\S*python\S*: ", "python: ", errors.partition("hal run: CUDA was")[0], flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path):
    """Programs of every form that Python takes, most of them bad."""
    files = {
        "raises.py": "def step():\n    raise ValueError('no data')\nstep()\n",
        "exit_number.py": "import sys\nsys.exit(7)\n",
        "exit_text.py": "import sys\nsys.exit('no data')\n",
        "exit_none.py": "import sys\nsys.exit(None)\n",
        "syntax.py": "x = 1\ndef f(:\n    pass\n",
        "relative.py": "from . import data\n",
        "empty/data.txt": "",
        "folder/__main__.py": "import sys, beside\nprint(__name__, __file__, sys.argv, sys.path[0], beside.x)\n",
        "folder/beside.py": "x = 1\n",
        "package/__init__.py": "",
        "package/part.py": "from . import other\nimport sys\nprint(__name__, __package__, sys.argv[1:])\n",
        "package/other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(tmp_path / "folder" / "__main__.py", "__main__.py")
        archive.write(tmp_path / "folder" / "beside.py", "beside.py")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["raises.py"], ["exit_number.py"], ["exit_text.py"], ["exit_none.py"], ["syntax.py"], ["relative.py"], ["empty"],
        ["folder", "a"], ["archive.zip", "-b"], ["-m", "package.part", "a", "-b"], ["-m", "package"], ["-m", "missing"],
        ["-", "a"], ["-c", "import sys; print(sys.argv)", "a"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_program_begins_and_ends_as_under_plain_python(arguments, folder):
    python = run([sys.executable, *arguments], folder)
    ours = run([HAL, "run", "--device", "cpu", "--report", "report.json", *arguments], folder, TMPDIR=str(folder))
    assert (ours.returncode, ours.stdout) == (python.returncode, python.stdout), ours.stderr
    assert told(ours.stderr) == told(python.stderr)
    assert json.loads((folder / "report.json").read_text())["processes"] == 1
    assert list(folder.glob("hal-run-*")) == []


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--report /proc/report.json", 2, "the report cannot be written"),
        ("--report .", 2, "is a directory"),
        ("--nproc -1", 2, "nproc"),
        ("--nproc many", 2, "nproc"),
        ("--nproc 100000", 2, "--nproc of at most"),
        ("--nproc 2 --device nonsense", 3, "no backend of this name"),
        ("--nproc 2 --device cpu:9", 3, "there is no such device"),
        ("--nproc 2 --device cpu --rdzv-backend nonsense", 2, "'nonsense' is not registered"),
        ("--nproc 2 --device cpu -c", 2, "several processes"),
        ("-m -c", 2, "not both"),
        ("--nonsense", 2, "--nonsense"),
    ],
)
def test_what_is_wrong_is_one_message_before_any_process_starts(options, status, words, folder):
    (folder / "started.py").write_text("open('started', 'w')")
    done = run([HAL, "run", *options.split(), "started.py"], folder, TMPDIR=str(folder))
    assert (done.returncode, (folder / "started").exists()) == (status, False), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 8
    assert list(folder.glob("hal-run-*")) == []


def test_a_report_that_may_be_written_is_not_touched_before_the_end(folder):
    (folder / "old.json").write_text("old")
    for report in ("old.json", "new.json"):
        assert run([HAL, "run", "--device", "nonsense", "--report", report, "raises.py"], folder).returncode == 3
    assert ((folder / "old.json").read_text(), (folder / "new.json").exists()) == ("old", False)


def test_a_disk_that_is_full_in_the_end_is_told_and_costs_only_the_report(program):
    done = program("print('done')", options=("--device", "cpu", "--report", "/dev/full"))
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "the report could not be written" in done.stderr
    assert "report: /dev/full" not in done.stderr


@pytest.mark.parametrize(
    ("ending", "status"),
    [("os._exit(9)", 9), ("raise ValueError(9)", 1), ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT)],
)
def test_the_report_is_written_however_the_program_ends(ending, status, program, tmp_path):
    done = program(f"import os, signal, torch\ntorch.ones(1).cuda()\n"
                   f"signal.signal(signal.SIGINT, signal.default_int_handler)\n{ending}",
                   options=("--device", "cpu", "--report", str(tmp_path / "report.json")), TMPDIR=str(tmp_path))  # fmt: skip
    assert done.returncode == status
    entries = json.loads((tmp_path / "report.json").read_text())["entries"]
    assert [(entry["api"], entry["line"]) for entry in entries] == [("torch.Tensor.cuda", 2)]
    assert list(tmp_path.glob("hal-run-*")) == []


def test_more_devices_than_there_are_is_the_error_that_cuda_raises(program):
    done = program(
        """
        import torch
        assert torch.cuda.device_count() == 1 and torch.cuda.get_device_capability() >= (8, 0)
        for ask in (lambda: torch.ones(1).cuda(1), lambda: torch.ones(1).to(1), lambda: torch.ones(1, device="cuda:1"),
                    lambda: torch.cuda.set_device(1), lambda: torch.cuda.get_device_properties(1),
                    lambda: torch.nn.Linear(1, 1).to("cuda:1"), lambda: torch.cuda.device(1).__enter__(),
                    lambda: torch.cuda.get_device_capability(1), lambda: torch.cuda.synchronize(1)):
            try:
                ask()
            except RuntimeError as error:
                assert "invalid device ordinal" in str(error) and "cuda:0 only" in str(error)
            else:
                raise AssertionError
        """
    )
    assert done.returncode == 0, done.stderr


def test_tracebacks_that_a_program_prints_logs_or_gets_from_a_worker_show_its_own_lines(program):
    done = program(
        """
        import logging, multiprocessing, traceback
        import torch
        from torch.utils.data import DataLoader

        class Data(torch.utils.data.Dataset):
            def __len__(self): return 1
            def __getitem__(self, index): return torch.zeros(2, device="cuda:9")

        def fail(): Data()[0]

        if __name__ == "__main__":
            try:
                fail()
            except RuntimeError:
                traceback.print_exc()
                logging.exception("logged")
            child = multiprocessing.get_context("spawn").Process(target=fail)
            child.start()
            child.join()
            next(iter(DataLoader(Data(), num_workers=1)))
        """
    )
    assert done.returncode == 1
    assert done.stderr.count('__getitem__(self, index): return torch.zeros(2, device="cuda:9")') == 4, done.stderr
    assert "/hal/" not in done.stderr.replace("/torch/", "/").partition("hal run:")[0]


TRAINS_FOREVER = """
import multiprocessing, os, time, torch

def wait():
    time.sleep(3600)

if __name__ == "__main__":
    torch.ones(1).cuda()
    multiprocessing.get_context("fork").Process(target=wait, daemon=True).start()
    os.write(1, f"{os.getpid()}{chr(10)}".encode())
    wait()
"""


@pytest.mark.parametrize(
    ("number", "whom", "status"),
    [(signal.SIGINT, "launcher", 130), (signal.SIGTERM, "launcher", 143), (signal.SIGKILL, "launcher", -9),
     (signal.SIGKILL, "rank", 137)],
)  # fmt: skip
def test_a_run_that_is_ended_leaves_no_processes(number, whom, status, tmp_path, eventually):
    (tmp_path / "train.py").write_text(TRAINS_FOREVER)
    with (tmp_path / "errors").open("w") as errors:
        launcher = subprocess.Popen(
            [HAL, "run", "--device", "cpu", "--nproc", "2", "--report", "report.json", "train.py"], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            # A test run in the background ignores interrupts, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    ranks = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.stdout.close()
    processes = psutil.Process(launcher.pid).children(recursive=True)
    assert len(processes) == 4
    os.kill(launcher.pid if whom == "launcher" else ranks[1], number)
    assert launcher.wait(240) == status
    if (number, whom) == (signal.SIGKILL, "launcher"):  # nobody is there to look after what a rank has forked
        orphans = [process for process in processes if process.pid not in ranks]
        processes = [process for process in processes if process.pid in ranks]
    else:
        orphans = []
        assert (tmp_path / "report.json").exists()
    try:
        assert eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))
    finally:
        for process in (*orphans, *processes):
            if process.is_running():
                process.kill()
    assert "a fault in hal" not in (tmp_path / "errors").read_text()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_program_without_outputs_runs(closed, tmp_path):
    script, found = tmp_path / "p.py", tmp_path / "found"
    script.write_text(f"import torch\nopen({str(found)!r}, 'w').write(str(torch.ones(2, device='cuda').device))\n")
    command = f"{shlex.quote(HAL)} run --device cpu {shlex.quote(str(script))} {closed}"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert (done.returncode, found.read_text()) == (0, "cuda:0"), done.stderr
