# SPDX-License-Identifier: Apache-2.0
"""How much of a float32 number survives in a product: crafted numbers, multiplied where the answer is known exactly.

The product of two numbers whose significands have at most 24 bits together is a float32. IEEE arithmetic returns it
exactly, and so does any accumulator of 24 bits, in any order, if every other product is an exact zero. So whatever is
missing from the result was cut from the inputs, or dropped on the way.

The numbers have p significand bits, the hidden one and the last one among them, for every p up to 24: 1 + 2**-(p-1),
and the same with one more bit at each place between. The bit between is what shows a sum of two short numbers: 1 and
2**-(p-1) alone are a sum of two bfloat16 for every p, while 2**-9 + 2**-17 is too long for the second of them.

What a unit shows (tests/hal/test_fp32_probe.py computes each)::

    how it multiplies                                 input bits    product bits
    IEEE float32                                      24            12
    inputs cut or rounded to N bits                   N             min(N, 12)
      (TF32, XF32: 11; HF32: 12; bfloat16: 8)
    two bfloat16 each, three products                 16 or 17      8
      (17 if the first is rounded: the second
      then carries a bit by its sign)
    two bfloat16 each, all four products              16 or 17      12
    three bfloat16 each, six products or more         24            12

The last row cannot be told from IEEE, and need not be: what it drops is less than one rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNIFICAND = 24
"""Significand bits of a float32, the hidden one included."""

SIZE = 320
"""Rows and columns of the operands: room for all numbers, and a multiple of 64. Small or odd shapes may take a kernel
without the matrix unit."""

Multiply = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Multiplies two float32 matrices, [SIZE, SIZE] each, from the host and back to it."""


@dataclass(frozen=True)
class Kept:
    """What survives of float32 numbers in a product.

    Attributes:
        input_bits: up to this many significand bits, every number comes back whole from a product with 1, on both
            sides. At most 24.
        product_bits: up to this many bits, the product of any two of them comes back whole. At most 12: a product of
            longer ones is no float32.
    """

    input_bits: int
    product_bits: int


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the crafted numbers, float64 and exact in float32, and how many significand bits each has; 1 is first."""
    import torch

    one, last = 0, range(1, SIGNIFICAND)
    bits = [{one}] + [{one, i} for i in last] + [{one, j, i} for i in last for j in range(1, i)]
    values = [sum(2.0**-place for place in places) for places in bits]
    lengths = [1 + max(places) for places in bits]
    return (
        torch.tensor(values, dtype=torch.float64, device="cpu"),
        torch.tensor(lengths, dtype=torch.int64, device="cpu"),
    )


def kept(multiply: Multiply) -> Kept:
    """Multiply every number with every other, and count the bits up to which nothing is lost."""
    import torch

    x, bits = numbers()
    n = len(x)
    left = torch.zeros(SIZE, SIZE, dtype=torch.float32, device="cpu")
    right = torch.zeros(SIZE, SIZE, dtype=torch.float32, device="cpu")
    left[range(n), range(n)] = x.to(torch.float32)
    right[:, :n] = x.to(torch.float32)
    whole = multiply(left, right)[:n, :n].to(torch.float64) == x[:, None] * x[None, :]
    longer = torch.maximum(bits[:, None], bits[None, :])
    with_one = (bits[:, None] == 1) | (bits[None, :] == 1)
    half = SIGNIFICAND // 2
    return Kept(
        input_bits=_up_to(SIGNIFICAND, longer[with_one & ~whole]),
        product_bits=_up_to(half, longer[(longer <= half) & ~whole]),
    )


def _up_to(most: int, lost: torch.Tensor) -> int:
    """Return the number of bits below the shortest number that was lost."""
    return most if lost.numel() == 0 else int(lost.min()) - 1
