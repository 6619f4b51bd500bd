# SPDX-License-Identifier: Apache-2.0
"""The two programs of docs/porting.md compute the same, and the page shows how they differ."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
CUDA, ANY = DOCS / "porting" / "train_cuda.py", DOCS / "porting" / "train.py"
BIN = Path(sys.executable).parent


def losses(command, folder, **environment):
    """Return what a program printed of its losses, which fall."""
    folder.mkdir()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder, check=True,
                          env={**os.environ, **environment}, timeout=240)  # fmt: skip
    printed = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(printed) == 20
    assert printed[-1] < printed[0] / 3
    assert (folder / "model.pt").exists()
    return printed


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_forms_print_the_same_losses(ranks, tmp_path):
    several = ["--nproc", ranks] if ranks > 1 else []
    ported = [BIN / "torchrun", "--standalone", "--nproc-per-node", ranks, ANY] if ranks > 1 else [sys.executable, ANY]
    as_cuda = losses([BIN / "hal", "run", "--device", "cpu", *several, CUDA], tmp_path / "cuda")
    assert losses(ported, tmp_path / "any", HAL_DEVICE="cpu") == as_cuda


def test_the_page_shows_the_difference():
    old, new = (file.read_text().splitlines(keepends=True) for file in (CUDA, ANY))
    difference = "".join(difflib.unified_diff(old, new, CUDA.name, ANY.name, n=1))
    assert f"```diff\n{difference}```\n" in (DOCS / "porting.md").read_text()
