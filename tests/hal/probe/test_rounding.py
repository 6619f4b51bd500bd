# SPDX-License-Identifier: Apache-2.0
"""What is built into a unit is what is found: bits, rounding, products, operands."""

from __future__ import annotations

import pytest
from fake_units import along, multiplier, rounded

from hal.probe.report import unit_facts
from hal.probe.rounding import rounding
from hal.probe.special import operands
from hal.probe.tree import leaf, node

K = 8


def ascending():
    tree = leaf(0)
    for k in range(1, K):
        tree = node([tree, leaf(k)])
    return tree


NAMES = {"even": "nearest, ties to even", "away": "nearest, ties away", "zero": "toward zero", "down": "down"}


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("bits", [8, 11, 14, 20, 24])
def test_the_width_and_the_rounding_of_an_accumulator(bits, how):
    multiply = multiplier(lambda products: along(ascending(), products, bits, how))
    found = rounding(multiply, ascending(), 24)
    assert (found.accumulator_bits, found.at_least, found.sums) == (bits, False, NAMES[how])
    assert found.group == 1
    assert found.alignment_bits is None


@pytest.mark.parametrize("product", [lambda x: x, lambda x: rounded(x, 24)], ids=["exact", "rounded"])
def test_products_that_are_rounded_first(product):
    multiply = multiplier(lambda products: along(ascending(), products, 24, "even"), product=product)
    assert rounding(multiply, ascending(), 24).products == ("exact" if product(1 + 2**-30) == 1 + 2**-30 else "rounded")


@pytest.mark.parametrize(("bits", "how", "name"), [
    (11, "zero", "cut"), (12, "even", "nearest, ties to even"), (12, "away", "nearest, ties away"), (8, "zero", "cut"),
])  # fmt: skip
def test_operands_that_lose_bits(bits, how, name):
    """TF32 keeps 11; HF32 12, and its vendor's documents disagree about the rounding."""
    multiply = multiplier(sum, change=lambda x: float(rounded(x, bits, how)) if x else 0.0)
    found = operands(multiply, K)
    assert (found.bits, found.rounding) == (bits, name)


def test_operands_that_are_two_numbers_each_are_split():
    def change(x):
        first = float(rounded(x, 8)) if x else 0.0
        return first + (float(rounded(x - first, 8)) if x - first else 0.0)

    assert operands(multiplier(sum, change=change), K).bits in (16, 17)


def test_a_unit_without_a_tree_still_has_operands():
    facts = unit_facts(multiplier(sum), K)
    assert facts.order.startswith("no tree: ")
    assert (facts.accumulator_bits, facts.input_bits) == (None, 24)
