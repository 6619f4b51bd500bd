# SPDX-License-Identifier: Apache-2.0
"""Ways to multiply whose order, width and rounding are chosen, as a probe's device. Sums are exact fractions, rounded."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from hal.probe.multiplier import Multiplier
from hal.probe.tree import Tree


def rounded(x, bits, how="even"):
    """Return a fraction rounded to so many significand bits: "even", "away", "zero" or "down"."""
    if x == 0:
        return x
    exponent = math.floor(math.log2(abs(float(x)))) if abs(float(x)) > 0 else 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits + 1)
    scaled = x / unit
    if how == "zero":
        return unit * math.trunc(scaled)
    if how == "down":
        return unit * math.floor(scaled)
    if how == "away":
        return unit * int(math.copysign(1, scaled)) * math.floor(abs(scaled) + Fraction(1, 2))
    return unit * round(scaled)


def along(tree: Tree, products, bits, how):
    """Return the sum of products along a tree, rounded at each node."""
    if tree.is_leaf:
        return products[tree.leaves[0]]
    return rounded(sum(along(child, products, bits, how) for child in tree.children), bits, how)


def absorbing(tree: Tree, products):
    """Return the same, where a node with more than two children cuts each at 24 bits below the largest."""
    if tree.is_leaf:
        return products[tree.leaves[0]]
    terms = [absorbing(child, products) for child in tree.children]
    if len(terms) == 2:
        return rounded(terms[0] + terms[1], 24)
    largest = max((abs(term) for term in terms), default=Fraction(0))
    if largest == 0:
        return Fraction(0)
    unit = Fraction(2) ** (math.floor(math.log2(float(largest))) - 24)
    return sum((unit * math.trunc(term / unit) for term in terms), start=Fraction(0))


def multiplier(total, format="float32", outer=8, change=lambda x: x, product=lambda x: x):
    """Return a multiplier of which only the diagonal is computed: nothing else of a product is looked at.

    Args:
        total: exact products, by k, to their sum.
        format: of operands.
        outer: rows and columns.
        change: what is done to each operand, a float, first.
        product: what is done to each exact product.
    """
    dtype = getattr(torch, format)

    def kernel(a, b):
        found = torch.zeros(a.shape[0], b.shape[1], dtype=dtype)
        for i in range(min(found.shape)):
            pairs = zip(a[i].double().tolist(), b[:, i].double().tolist(), strict=True)
            pairs = list(pairs)
            if not all(math.isfinite(x * y) for x, y in pairs):
                found[i, i] = sum(x * y for x, y in pairs)
                continue
            products = [product(Fraction(change(x)) * Fraction(change(y))) for x, y in pairs]
            found[i, i] = float(total(products))
        return found

    return Multiplier(format, torch.device("cpu"), kernel, dtype, dtype, outer)
