# SPDX-License-Identifier: Apache-2.0
"""What hal costs: at start-up, and in each call over the device's own.

python benchmarks/overhead.py [--rounds N]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
from harness import Group, Subject, command, loop, main

import hal

PYTHON = sys.executable
HAL = str(Path(PYTHON).parent / "hal")

OPENING = """
import time, torch
start = time.perf_counter()
import hal
device = hal.open_device("cpu")
print((time.perf_counter() - start) * 1e3)
"""


def opening_ms() -> float:
    """Milliseconds of `import hal` and opening the CPU in a fresh process that has torch already."""
    # As in an installation, whose modules are compiled.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([PYTHON, "-c", OPENING], check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def own_calls() -> object:
    """Make the calls to the system without which there is no answer to `stats()`."""
    with open("/proc/self/status", "rb", buffering=0) as file:  # noqa: PTH123  as cheap as it gets
        file.read()
    return psutil.virtual_memory().available


if __name__ == "__main__":
    memory = hal.open_device("cpu").memory
    start_up = [
        Subject("python -c 'import torch'", command(PYTHON, "-c", "import torch")),
        Subject("python -c pass", command(PYTHON, "-c", "pass")),
        Subject("hal --help", command(HAL, "--help"), "python -c pass", "below 0.2 s"),
        Subject("hal devices", command(HAL, "devices"), "python -c 'import torch'", "ratio below 1.3"),
    ]
    calls = [
        Subject("an attribute that is None", loop(lambda: None)),
        Subject("memory.allocated()", loop(memory.allocated), "an attribute that is None", "at most 1 us more"),
        Subject("the system's own calls", loop(own_calls)),
        Subject("memory.stats()", loop(memory.stats), "the system's own calls", "at most 5 us more"),
    ]
    main(
        "overhead",
        "What hal costs",
        [
            Group("s", start_up),
            Group("ms", [Subject("import hal, open the CPU", opening_ms, target="at most 30 ms")]),
            Group("us", calls),
        ],
    )
