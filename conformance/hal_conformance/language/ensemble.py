# SPDX-License-Identifier: Apache-2.0
"""The ensemble behind the trajectories' bands: `python -m hal_conformance.language.ensemble FILE` computes it anew.

For each model and dtype: the median and the median absolute deviation, step by step, of `TWINS` honest runs of one
seed; the largest deviation of each run in units of the latter, sorted, for the first steps and for all; and the final
losses of `SEEDS` runs of as many seeds.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hal_conformance.case import F64, Array, Arrays
from hal_conformance.language import curves as run
from hal_conformance.language.twins import operators, twin
from hal_conformance.numerics.bounds import U32
from hal_conformance.pool import pool

FILE = "ensemble.safetensors"
TWINS = 199
"""An honest device is outside of all of them once in 200 runs."""
SEEDS = 48
WINDOW = 20
"""Last steps whose mean is a run's final loss."""
FEW = 10
"""Steps of the shorter band, which is a beginning of the longer one."""
DTYPES = ("float32", "bfloat16")


@functools.cache
def ensemble() -> MappingProxyType[str, Array]:
    """Return the arrays by name, read-only."""
    from safetensors.numpy import load

    found = load(files("hal_conformance.language").joinpath(FILE).read_bytes())
    for array in found.values():
        array.flags.writeable = False
    return MappingProxyType(found)


def deviation(curve: F64, median: F64, mad: F64) -> float:
    """Return the largest distance of two curves from their medians, in the units of each step."""
    return float(np.max(np.abs(curve - median) / unit(median, mad)))


def unit(median: F64, mad: F64) -> F64:
    """Return the median absolute deviation; where honest runs agree to the last bit, an ulp of float32."""
    return np.asarray(np.maximum(mad, 2.0 * U32 * np.abs(median)))


def final(curve: F64) -> float:
    """Return a run's final loss."""
    return float(curve[0, -WINDOW:].mean())


def compute(name: str, dtype: str, twins: int = TWINS, seeds: int = SEEDS) -> Arrays:
    """Return the arrays of one model in one dtype."""
    import torch

    from hal_conformance.portable import portable

    spec, kind = run.model(name), getattr(torch, dtype)

    def seen_of(ops: Any, start: Arrays, seed: int) -> F64:
        placed = {key: torch.from_numpy(array) for key, array in start.items()}
        return np.asarray(run.curves(ops, spec, placed, seed, run.STEPS, kind).numpy(), np.float64)

    begins = run.start(spec, 0)
    seen = np.array([seen_of(operators(n), twin(begins, spec, n), 0) for n in range(1, twins + 1)])
    median = np.median(seen, axis=0)
    mad = np.median(np.abs(seen - median), axis=0)
    found = {"median": median, "mad": mad}
    for steps in (FEW, run.STEPS):
        place = slice(steps)
        found[f"largest/{steps}"] = np.sort([deviation(c[:, place], median[:, place], mad[:, place]) for c in seen])
    final_of = (final(seen_of(portable, run.start(spec, seed), seed)) for seed in range(1, seeds + 1))
    found["final"] = np.array(list(final_of))
    return {f"{name}/{dtype}/{key}": array for key, array in found.items()}


def main() -> None:
    """Write the file."""
    import torch
    from safetensors.numpy import save_file

    found: Arrays = {}
    with pool(os.cpu_count() or 1, torch.set_num_threads, 1) as workers:
        for arrays in workers.map(compute, *zip(*itertools.product(run.MODELS, DTYPES), strict=True)):
            found |= arrays
    save_file(found, Path(sys.argv[1]), metadata={"torch": torch.__version__, "numpy": np.__version__})


if __name__ == "__main__":
    main()
