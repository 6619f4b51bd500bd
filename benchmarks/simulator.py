# SPDX-License-Identifier: Apache-2.0
"""What a product on a simulated matrix unit costs, against torch's own in float32 with as many threads.

python benchmarks/simulator.py [--rounds N]

Both are called directly, with operands in float32 as the unit takes them in: the ratio is that of the arithmetic. The
last group has the whole call from a tensor of 16 bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from harness import Group, Subject, loop, main

from hal.matrix_unit import FORMATS, MATRIX_UNITS, MatrixUnit
from hal_sim import native, product, twin

UNITS = (
    ("Hopper bfloat16", "sm_90", "bfloat16"),
    ("Hopper e4m3", "sm_90", "float8_e4m3fn"),
    ("A100 bfloat16", "sm_80", "bfloat16"),
    ("V100 float16", "sm_70", "float16"),
    ("B200 e4m3", "sm_100", "float8_e4m3fn"),
    ("MI300X float16", "gfx942", "float16"),
    ("MI250 float16", "gfx90a", "float16"),
)
SHAPES = ((1, 256), (1, 512), (1, 1024), (256, 64))
"""Batch, and all three sizes of a matrix."""


def timed_ms(body: Callable[[], object], threads: int, at_least_s: float = 0.004) -> Callable[[], float]:
    """Return a measurement of one call: milliseconds, the least of as many as fit in some time."""

    def run() -> float:
        torch.set_num_threads(threads)
        best, spent = float("inf"), 0.0
        while spent < at_least_s:
            start = time.perf_counter()
            body()
            took = time.perf_counter() - start
            best, spent = min(best, took), spent + took
        return best * 1e3

    return run


def on_unit(
    core: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor, unit: MatrixUnit, format: str
) -> Callable[[], object]:
    """Return a product from zero by one of the implementations."""
    dtype = getattr(torch, format)
    a, b = (product.operand(x.to(dtype), format) for x in (a, b))
    least = (FORMATS[format].min_exponent,) * 2
    c = torch.zeros(()).expand(len(a), a.shape[1], b.shape[2]) if core is twin.multiply else None
    return lambda: core(a, b, c, unit, least)


def of_shape(batch: int, size: int, threads: int) -> Group:
    """Return torch's product of random matrices and that of each unit."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(batch, size, size, generator=generator) for _ in range(2))
    library = native.library()
    if library is None:
        raise SystemExit("there is no compiled library to measure")

    def core(*given: object) -> torch.Tensor:
        return native.multiply(library, *given)  # type: ignore[arg-type]

    where = f"{batch} x {size}^3" if batch > 1 else f"{size}^3"
    where += f", {threads} thread{'s' if threads > 1 else ''}"
    baseline = f"torch float32, {where}"
    subjects = [Subject(baseline, timed_ms(lambda: torch.bmm(a, b), threads))]
    for name, architecture, format in UNITS:
        unit = MATRIX_UNITS[architecture][format]
        body = on_unit(core, a, b, unit, format)
        subjects.append(Subject(f"{name}, {where}", timed_ms(body, threads), baseline))
    if (batch, size) == (1, 256):
        unit = MATRIX_UNITS["sm_90"]["bfloat16"]
        body = on_unit(twin.multiply, a, b, unit, "bfloat16")
        subjects.append(Subject(f"Hopper bfloat16 in torch's operators, {where}", timed_ms(body, threads), baseline))
    return Group("ms", subjects)


def fixed() -> Group:
    """Return calls with next to no arithmetic."""
    unit, formats = MATRIX_UNITS["sm_90"]["bfloat16"], ("bfloat16", "bfloat16")
    a = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    library, narrow = native.library(), a.bfloat16()
    return Group("us", [
        Subject("torch.bmm of 4 x 4 x 4", loop(lambda: torch.bmm(a, a))),
        Subject("native.multiply of 4 x 4 x 4",
                loop(lambda: native.multiply(library, a, a, None, unit, (-126, -126)))),
        Subject("product.multiply of 4 x 4 x 4", loop(lambda: product.multiply(narrow, narrow, unit, formats)),
                target="at most 30 us"),
    ])  # fmt: skip


if __name__ == "__main__":
    main(
        "simulator",
        "What a simulated matrix unit costs",
        [*(of_shape(batch, size, threads) for threads in (1, 2) for batch, size in SHAPES), fixed()],
    )
