# SPDX-License-Identifier: Apache-2.0
"""How long the conformance suite takes on the CPU, as whole processes, in how much memory, and which cases are slowest.

python benchmarks/suite.py [--rounds N]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as beside a worker

from harness import Group, Subject, command, main, peak_gib
from in_process import judged

from hal.contract import Contract
from hal_conformance.cases import ALL
from hal_conformance.execution.plan import Selection, plan

HAL = str(Path(sys.executable).parent / "hal")
HERE = Path(__file__).parent


def slowest() -> tuple[dict[str, object], str]:
    """Return the ten cases of scale small that take longest: making inputs, running and judging, in one process."""
    taken, tasks = Counter[str](), Counter[str]()
    for task in plan(Selection(scale="small"), ALL):
        start = time.perf_counter()
        judged(task, Contract())
        taken[task.case.name] += time.perf_counter() - start
        tasks[task.case.name] += 1
    rows = [{"case": name, "tasks": tasks[name], "seconds": seconds} for name, seconds in taken.most_common(10)]
    lines = [
        "",
        f"The ten slowest of {len(taken)} cases at scale small, in one process ({sum(taken.values()):.0f} s in all):",
        "",
        "| case | tasks | s |", "|---|---|---|",
        *(f"| {row['case']} | {row['tasks']} | {row['seconds']:.2f} |" for row in rows),
    ]  # fmt: skip
    return {"slowest": rows}, "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        own, other = (str(Path(folder) / f"{name}.safetensors") for name in ("own", "other"))
        run = (HAL, "conformance", "run", "--device", "cpu", "--scale")
        record = (HAL, "conformance", "record", "--device", "cpu")
        os.chdir(HERE)  # where `elsewhere` is found
        command(*record, "-o", own)()  # a round has an order of its own
        command(*record, "--impl", "elsewhere:ops", "-o", other)()
        compare = (HAL, "conformance", "compare", own)
        seconds = [
            Subject("python -c 'import torch'", command(sys.executable, "-c", "import torch")),
            Subject("conformance record, scale small", command(*record, "-o", own), target="a file of at most 5 MB"),
            Subject("conformance run --scale tiny", command(*run, "tiny"), target="15"),
            Subject("conformance run --scale small", command(*run, "small"), target="120"),
            Subject("conformance compare, the same bits", command(*compare, own), target="20"),
            Subject("conformance compare, other bits", command(*compare, other), target="20"),
        ]  # fmt: skip
        memory = [Subject("conformance run --scale small, peak", peak_gib(*run, "small"), target="4")]
        file = [Subject("a recording of scale small", lambda: Path(own).stat().st_size / 1e6, target="5")]
        groups = [Group("s", seconds), Group("GiB", memory), Group("MB", file)]
        main("suite", "The conformance suite on a CPU", groups, slowest)
