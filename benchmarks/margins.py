# SPDX-License-Identifier: Apache-2.0
"""How tight the suite's bounds are, and whether it cries wolf: the portable operators on the CPU, many seeds.

python benchmarks/margins.py [--seeds N] [--first K] [--scale tiny] [--case GLOB]... [--name margins]

Every result is judged as `hal conformance run` does, in one process. The table states, by case and dtype, the median
over all instances and the largest of the largest error over its bound: a bound that is never approached catches
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from harness import machine
from in_process import judged

import hal
from hal_conformance.case import DTYPES
from hal_conformance.cases import ALL
from hal_conformance.execution.plan import Selection, plan
from hal_conformance.numerics.budget import FALSE_ALARMS_PER_RUN


def main() -> None:
    """Run the seeds and write JSON and Markdown under `results/`."""
    parser = argparse.ArgumentParser(description="Margins and false alarms of the conformance suite")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--scale", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--case", action="append", default=[], help="globs of cases or families")
    parser.add_argument("--name", default="margins", help="of the files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    statuses: Counter[str] = Counter()
    margins: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    odd: list[str] = []
    started = time.monotonic()
    with hal.open_device("cpu") as device:
        for seed in range(options.first, options.first + options.seeds):
            for task in plan(Selection(tuple(options.case), scale=options.scale, seed=seed), ALL):
                verdict = judged(task, device.contract)
                statuses[verdict.status.value] += 1
                if verdict.status.colour != "green":
                    odd.append(f"seed {seed}, {task}: {verdict.status.value}: {verdict.detail}")
                if verdict.margin is not None:
                    margins[task.case.name][task.params.dtype].append(verdict.margin)
    table = {
        name: {dtype: [statistics.median(found), max(found)] for dtype, found in by_dtype.items()}
        for name, by_dtype in sorted(margins.items())
    }
    report = {
        "schema": "hal.benchmark/1", "name": options.name, "machine": machine(), "scale": options.scale,
        "seeds": [options.first, options.first + options.seeds - 1], "judged": sum(statuses.values()),
        "statuses": dict(statuses), "not_green": odd, "margins": table,
        "predicted_false_alarms": FALSE_ALARMS_PER_RUN * options.seeds,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    lines = [
        f"# Margins at scale {options.scale}, {options.seeds} seeds from {options.first}", "",
        f"{report['judged']} results: {', '.join(f'{n} {s}' for s, n in sorted(statuses.items()))}. "
        f"Predicted false alarms: {report['predicted_false_alarms']:.0e}.", "",
        *odd, "| case | " + " | ".join(f"{dtype} median, largest" for dtype in DTYPES) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, by_dtype in table.items():
        cells = (f"{by_dtype[d][0]:.2f}, {by_dtype[d][1]:.2f}" if d in by_dtype else "" for d in DTYPES)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{options.name}.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(1 if odd else 0)


if __name__ == "__main__":
    main()
