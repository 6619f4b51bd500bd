# SPDX-License-Identifier: Apache-2.0
"""An implementation that leaves a switch of the process moved gets a verdict, and nobody else notices."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hal_conformance.process_state import ProcessState

MOVES = {
    "numpy": lambda: np.seterr(all="raise"),
    "gradient mode": lambda: torch.set_grad_enabled(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "subnormals": lambda: torch.set_flush_denormal(True),
    "mkldnn": lambda: torch.backends.mkldnn.set_flags(False),
    "autocast on cpu": lambda: torch.set_autocast_enabled("cpu", True),
    "float32 precision": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("what", MOVES)
def test_what_moved_is_named_and_put_back(what):
    if what == "float32 precision" and not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"):
        pytest.skip("this torch has one switch for all, with the older name")
    state = ProcessState("cpu")
    before = state.read()
    MOVES[what]()
    moved = state.restore(before)
    assert len(moved) == 1
    assert what in moved[0]
    assert state.read() == before
    assert state.restore(before) == []


def test_the_number_of_threads_is_put_back_without_a_word():
    state, threads = ProcessState("cpu"), torch.get_num_threads()
    before = state.read()
    torch.set_num_threads(threads + 1)
    assert state.restore(before) == []
    assert torch.get_num_threads() == threads


LEAVES = """
import torch
from hal.moe.torch_ops import torch_ops

class Leaves:
    def aux_loss(self, *given, **named):
        return torch_ops.aux_loss(*given, **named)
    def z_loss(self, *given, **named):
        found = torch_ops.z_loss(*given, **named)
        torch.set_default_dtype(torch.float64)
        return found

ops = Leaves()
"""


def test_the_case_that_moved_a_switch_fails_and_those_after_it_do_not(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [str(Path(sys.executable).parent / "hal"), "conformance", "run", "--device", "cpu", "--scale", "tiny",
               "--impl", "leaves:ops", "--case", "losses", "--dtype", "float32", "--json", "out.json"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, timeout=300)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    by_status = {status: [row for row in results if row["status"] == status] for status in ("FAIL-STRUCTURE", "PASS")}
    assert by_status["FAIL-STRUCTURE"]
    assert all("left the default dtype at torch.float64" in row["detail"] for row in by_status["FAIL-STRUCTURE"])
    assert {row["status"] for row in results} <= {"FAIL-STRUCTURE", "PASS", "EXACT", "UNSUPPORTED"}
    assert any(row["status"] in ("PASS", "EXACT") for row in results)
