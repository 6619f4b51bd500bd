# SPDX-License-Identifier: Apache-2.0
"""Programs of one test, and the modules beside it: the exercises are a program, the table of coverage writes a page."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

HAL = str(Path(sys.executable).parent / "hal")


@pytest.fixture
def program(tmp_path):
    """Writes a program into a folder of its own, and runs it under `hal run`."""

    def run(code, *arguments, options=("--device", "cpu"), name="train.py", **environment):
        file = tmp_path / name
        file.write_text(textwrap.dedent(code))
        return subprocess.run(
            [HAL, "run", *options, str(file), *arguments], capture_output=True, text=True, cwd=tmp_path, check=False,
            env={**os.environ, **environment}, timeout=240,
        )  # fmt: skip

    return run
