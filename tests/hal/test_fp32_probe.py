# SPDX-License-Identifier: Apache-2.0
"""The float32 measurement against units that really compute in each way, and against their errors."""

import pytest
import torch

from hal.fp32_probe import SIGNIFICAND, SIZE, Kept, kept, numbers


def cut(x, bits):
    """Keep the first significand bits."""
    return (x.view(torch.int32) & -(1 << (SIGNIFICAND - bits))).view(torch.float32)


def rounded(x, bits):
    """Round to nearest, ties to even, to this many significand bits."""
    scale = torch.exp2(torch.floor(torch.log2(x.double().abs().clamp_min(2.0**-126))) + 1 - bits)
    return (torch.round(x.double() / scale) * scale).float()


def parts(x, count, shorten):
    """Return x as a sum of numbers of 8 bits, as many as asked for."""
    found = []
    for _ in range(count):
        found.append(shorten(x, 8))
        x = x - found[-1]  # exact: the tail of a float32
    return found


def passes(count, most, shorten):
    """A product of `count` parts each, of which the pairs (i, j) with i + j <= most are multiplied, smallest first."""

    def multiply(a, b):
        a, b = parts(a, count, shorten), parts(b, count, shorten)
        pairs = [(i, j) for i in range(count) for j in range(count) if i + j <= most]
        total = torch.zeros(a[0].shape[0], b[0].shape[1])
        for i, j in sorted(pairs, key=sum, reverse=True):
            total += a[i] @ b[j]
        return total

    return multiply


def narrow(bits, shorten):
    return lambda a, b: shorten(a, bits) @ shorten(b, bits)


UNITS = {
    "ieee": (torch.matmul, Kept(24, 12)),
    "tf32 cut": (narrow(11, cut), Kept(11, 11)),
    "tf32 rounded": (narrow(11, rounded), Kept(11, 11)),
    "hf32 cut": (narrow(12, cut), Kept(12, 12)),
    "hf32 rounded": (narrow(12, rounded), Kept(12, 12)),
    "bf16 cut": (narrow(8, cut), Kept(8, 8)),
    "bf16 rounded": (narrow(8, rounded), Kept(8, 8)),
    "one bit short": (narrow(23, rounded), Kept(23, 12)),
    "bf16x3 cut": (passes(2, 1, cut), Kept(16, 8)),
    "bf16x3 rounded": (passes(2, 1, rounded), Kept(17, 8)),
    "bf16x4 cut": (passes(2, 2, cut), Kept(16, 12)),
    "bf16x4 rounded": (passes(2, 2, rounded), Kept(17, 12)),
    "bf16x6 cut": (passes(3, 2, cut), Kept(24, 12)),
    "bf16x6 rounded": (passes(3, 2, rounded), Kept(24, 12)),
    "bf16x9 rounded": (passes(3, 4, rounded), Kept(24, 12)),
    # Every bit of an input survives a product with 1, and the product of two tails is dropped all the same.
    "three parts, five passes": (
        lambda a, b: passes(3, 2, rounded)(a, b) - parts(a, 3, rounded)[1] @ parts(b, 3, rounded)[1],
        Kept(24, 8),
    ),
    "bf16x2, the right one short": (lambda a, b: sum(p @ rounded(b, 8) for p in parts(a, 2, rounded)), Kept(8, 8)),
    "the left one short": (lambda a, b: cut(a, 11) @ b, Kept(11, 11)),
    "the right one short": (lambda a, b: a @ cut(b, 11), Kept(11, 11)),
}


@pytest.mark.parametrize("unit", UNITS)
def test_each_way_of_multiplying_is_told_by_its_bits(unit):
    multiply, expected = UNITS[unit]
    assert kept(multiply) == expected


@pytest.mark.parametrize("unit", [unit for unit, (_, bits) in UNITS.items() if bits == Kept(24, 12)])
def test_what_passes_for_ieee_is_as_close_as_ieee(unit):
    torch.manual_seed(0)
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    error = lambda multiply: float(((multiply(a, b).double() - exact).abs() / scale).max())  # noqa: E731
    assert error(UNITS[unit][0]) < 2 * error(torch.matmul)


@pytest.mark.parametrize("unit", ["bf16x3 cut", "bf16x3 rounded", "bf16x4 rounded", "three parts, five passes"])
def test_what_does_not_is_not(unit):
    torch.manual_seed(0)
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    exact = a.double() @ b.double()
    error = lambda multiply: float((multiply(a, b).double() - exact).abs().max())  # noqa: E731
    assert error(UNITS[unit][0]) > 4 * error(torch.matmul)


def test_the_numbers_fit_the_operands_and_are_exact():
    x, bits = numbers()
    assert x[0] == 1
    assert len(x) <= SIZE
    assert torch.equal(x.float().double(), x)
    for number, length in zip(x.tolist(), bits.tolist(), strict=True):
        assert number * 2.0 ** (length - 1) % 2 == 1 or length == 1, "the last bit is set"
    assert set(bits.tolist()) == set(range(1, SIGNIFICAND + 1))


def test_a_unit_that_returns_nothing_keeps_nothing():
    assert kept(lambda a, b: torch.full((SIZE, SIZE), float("nan"))) == Kept(0, 0)
