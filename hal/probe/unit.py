# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one product of a device: all that masked sums, special numbers and roundings tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hal.errors import HalError
from hal.probe.facts import UnitFacts
from hal.probe.multiplier import Multiplier
from hal.probe.order import described, meeting, spine
from hal.probe.rounding import rounding
from hal.probe.special import extremes, operands
from hal.probe.tree import NoTree, Tree, summation_tree

INNER = 64
"""Inner length that is probed first, and rows and columns of each product."""

MOMENTS = 4
"""A sum must grow so often that its rounding can be seen; a longer product is taken until it does. Once less is enough
if more than one product is added at first."""

LONGEST = 256

LONGER = {512: 16, 1024: 32}
"""Inner lengths at which a library may share K out, and every which product is asked for there."""


def unit_facts(multiply: Multiplier, inner: int = INNER, longer: Mapping[int, int] = LONGER) -> UnitFacts:
    """Probe one product.

    Args:
        multiply: the product.
        inner: K; the next one that the product takes.
        longer: other K of which the order is asked, each with the distance of the products that show it.
    """
    tree, K = None, multiply.inner(inner)
    try:
        tree, K = _long_enough(multiply, K)
        order = described(tree)
    except NoTree as why:
        order = f"no tree: {why}"
    kept = operands(multiply, K)
    ends = extremes(multiply, (0, 1) if tree is None else meeting(tree), K)
    facts = UnitFacts(
        format=multiply.format,
        partner=multiply.partner,
        result=_name(multiply.result),
        inner=K,
        order=order,
        input_bits=kept.bits,
        input_rounding=kept.rounding,
        subnormal_inputs=kept.subnormals,
        subnormal_results=ends.subnormal_results,
        overflow=ends.overflow,
        overflow_stored=ends.overflow_stored,
        infinity=ends.infinity,
        nan=ends.nan,
        nan_bits=ends.nan_bits,
        zero_signs=ends.zero_signs,
    )
    if tree is None:
        return facts
    facts = replace(facts, longer={str(K): _sparse(multiply, K, spacing) for K, spacing in longer.items()})
    sums = rounding(multiply, tree, kept.bits, flushes=kept.subnormals == "flushed")
    return replace(
        facts,
        tree=tree.text,
        group=sums.group,
        accumulator_bits=sums.accumulator_bits,
        accumulator_at_least=sums.at_least,
        alignment_bits=sums.alignment_bits,
        aligned=sums.aligned,
        exponents=sums.exponents,
        products_under_sum=sums.products_under_sum,
        rest_under_sum=sums.rest_under_sum,
        sum_under_product=sums.sum_under_product,
        sums=sums.sums,
        small_sum=sums.small_sum,
        products=sums.products,
        stored=sums.stored,
    )


def _long_enough(multiply: Multiplier, inner: int) -> tuple[Tree, int]:
    K = inner
    while True:
        tree = summation_tree(multiply, K)
        moments = spine(tree)
        if len(moments) + (len(moments[0]) > 1) >= MOMENTS or 2 * K > LONGEST:
            return tree, K
        K *= 2


def _sparse(multiply: Multiplier, K: int, spacing: int) -> str:
    try:
        return summation_tree(multiply, K, range(0, K, spacing)).text
    except (NoTree, RuntimeError, HalError) as why:
        return f"no tree: {why}"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
