# SPDX-License-Identifier: Apache-2.0
"""What a product on a simulated matrix unit costs, against torch's own in float32 with as many threads.

python benchmarks/simulator.py [--rounds N]

Products are those of the compiled core from operands of 16 or 8 bits, as a program has them, with results in float32;
torch's are of the same numbers in float32. Small matrices are compared with the large one, per multiply-add.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from harness import Group, Subject, loop, main

from hal.matrix_unit import FORMATS, MATRIX_UNITS
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
GOALS = {"Hopper bfloat16": 3.0, "Hopper e4m3": 3.0, "V100 float16": 4.0, "MI300X float16": 5.0}
"""With AVX-512, on two cores."""
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


def of_shape(batch: int, size: int, threads: int) -> Group:
    """Return torch's product of random matrices and that of each unit."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(batch, size, size, generator=generator) for _ in range(2))
    where = f"{batch} x {size}^3" if batch > 1 else f"{size}^3"
    where += f", {threads} thread{'s' if threads > 1 else ''}"
    baseline = f"torch float32, {where}"
    subjects = [Subject(baseline, timed_ms(lambda: torch.bmm(a, b), threads))]
    for name, architecture, format in UNITS:
        unit = MATRIX_UNITS[architecture][format]
        narrow = [x.to(getattr(torch, format)) for x in (a, b)]
        body = functools.partial(product.multiply, *narrow, unit, (format, format))
        goal = f"at most {GOALS[name]}" if name in GOALS and (batch, size, threads) == (1, 1024, 2) else ""
        subjects.append(Subject(f"{name}, {where}", timed_ms(body, threads), baseline, goal))
    if (batch, size) == (1, 256):
        unit, format = MATRIX_UNITS["sm_90"]["bfloat16"], "bfloat16"
        wide = [product.operand(x.bfloat16(), format) for x in (a, b)]
        zero = torch.zeros(()).expand(batch, size, size)
        body = functools.partial(twin.multiply, *wide, zero, unit, (FORMATS[format].min_exponent,) * 2)
        subjects.append(Subject(f"Hopper bfloat16 in torch's operators, {where}", timed_ms(body, threads), baseline))
    return Group("ms", subjects)


def small(threads: int) -> Group:
    """Return what a multiply-add costs where matrices are small, against the large product."""
    unit, formats = MATRIX_UNITS["sm_90"]["bfloat16"], ("bfloat16", "bfloat16")
    many = f"{threads} thread{'s' if threads > 1 else ''}"
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def cost(body: Callable[[], object], products: int) -> Callable[[], float]:
        measured = timed_ms(body, threads)
        return lambda: measured() * 1e9 / products

    def one(batch: int, size: int) -> Callable[[], float]:
        a, b = numbers(batch, size, size), numbers(batch, size, size)
        return cost(lambda: product.multiply(a, b, unit, formats), batch * size**3)

    def groups(sizes: torch.Tensor) -> Callable[[], float]:
        x, w = numbers(int(sizes.sum()), 64), numbers(len(sizes), 64, 64)
        first = (sizes.cumsum(0) - sizes).tolist()
        lengths = list(zip(first, sizes.tolist(), strict=True))
        return cost(lambda: product.multiply_groups(unit, formats, x, w, lengths, False), x.shape[0] * 64 * 64)

    large = f"Hopper bfloat16, 1024^3, a multiply-add, {many}"
    drawn = torch.randint(33, 97, (64,), generator=generator)
    return Group("ps", [
        Subject(large, one(1, 1024)),
        Subject(f"256 x 64^3, {many}", one(256, 64), large, "at most 1.5"),
        Subject(f"64 experts of 64 x 64, 64 tokens each, {many}", groups(torch.full((64,), 64)), large, "at most 1.5"),
        Subject(f"64 experts of 64 x 64, 33 to 96 tokens each, {many}", groups(drawn), large, "at most 1.5"),
    ])  # fmt: skip


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
        [
            *(of_shape(batch, size, threads) for threads in (1, 2) for batch, size in SHAPES),
            *(small(threads) for threads in (1, 2)),
            fixed(),
        ],
    )
