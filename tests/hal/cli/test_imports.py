# SPDX-License-Identifier: Apache-2.0
"""What must be quick imports nothing heavy, whatever the machine's speed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "ml_dtypes", "safetensors", "rich", "psutil", "sympy")


def imported(code: str, *arguments: str) -> set[str]:
    """Run code in a fresh interpreter; return which heavy packages it had imported at its end, even by SystemExit."""
    report = (
        "import atexit, sys; atexit.register(lambda: sys.stderr.write("
        f"'\\nIMPORTED ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code, *arguments],
        env={k: v for k, v in os.environ.items() if k not in ("HAL_DEVICE", "HAL_BACKENDS")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("IMPORTED"))
    return set(line.split()[1:])


def test_the_report_sees_an_import() -> None:
    assert imported("import numpy") == {"numpy"}


def test_importing_hal_imports_neither_torch_nor_numpy() -> None:
    assert imported("import hal") == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("devices", "--help"),
        ("doctor", "--help"),
        ("backend", "--help"),
        ("backend", "new", "--help"),
        ("backend", "check", "--help"),
        ("conformance", "--help"),
    ],
)
def test_help_imports_neither_torch_nor_numpy(arguments: tuple[str, ...]) -> None:
    assert imported("from hal.cli.main import main; main()", *arguments) == set()


def test_listing_the_cpu_imports_no_torch() -> None:
    code = "import os; os.environ['HAL_BACKENDS'] = 'cpu'; from hal.cli.main import main; main()"
    assert "torch" not in imported(code, "devices")
