# SPDX-License-Identifier: Apache-2.0
"""The tree of additions is found from outside, whatever it is, and a device without one is told."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from fake_units import absorbing, along, multiplier, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.probe import tree as trees
from hal.probe.multiplier import Multiplier
from hal.probe.order import described, fused, meeting, spine
from hal.probe.tree import NoTree, leaf, node, summation_tree


@st.composite
def any_tree(draw, most=14):
    """Return a tree over 2 or more products, in any order, whose nodes have two to five children."""
    forest = [leaf(k) for k in range(draw(st.integers(2, most)))]
    draw(st.randoms(use_true_random=False)).shuffle(forest)
    while len(forest) > 1:
        count = min(len(forest), draw(st.integers(2, 5)))
        at = draw(st.integers(0, len(forest) - count))
        forest[at : at + count] = [node(forest[at : at + count])]
    return forest[0]


@settings(max_examples=60, deadline=None)
@given(any_tree())
def test_any_tree_is_found_again_by_all_pairs_and_by_recursion(tree):
    multiply = multiplier(lambda products: absorbing(tree, products))
    K = len(tree.leaves)
    assert summation_tree(multiply, K).text == tree.text
    before, trees.ALL_PAIRS = trees.ALL_PAIRS, 1
    try:
        assert summation_tree(multiply, K).text == tree.text
    finally:
        trees.ALL_PAIRS = before


def test_sums_that_lose_nothing_have_no_tree():
    with pytest.raises(NoTree, match="no product is lost"):
        summation_tree(multiplier(sum), 8)


def test_an_order_that_changes_from_run_to_run_is_no_tree():
    generator = random.Random(1)

    def total(products):
        generator.shuffle(products)
        found = 0
        for term in products:
            found = rounded(found + term, 24)
        return found

    with pytest.raises(NoTree):
        summation_tree(multiplier(total), 12)


def test_rows_with_orders_of_their_own_are_no_tree():
    def kernel(a, b):
        found = torch.zeros(a.shape[0], b.shape[1])
        for i in range(a.shape[0]):
            products = (a[i] * b[:, i]).flip(0) if i % 2 else a[i] * b[:, i]
            for term in products:
                found[i, i] += term
        return found

    with pytest.raises(NoTree):
        summation_tree(Multiplier("float32", torch.device("cpu"), kernel, torch.float32, torch.float32, 8), 9)


def test_one_product_is_a_leaf():
    assert summation_tree(multiplier(sum), 1).is_leaf


# In words -------------------------------------------------------------------------------------------------------------


def chain(parts):
    return node(parts) if len(parts) == 2 else node([chain(parts[:-1]), parts[-1]])


def ascending(numbers):
    return chain([leaf(k) for k in numbers])


def groups(size, K):
    first, *rest = [[leaf(k) for k in range(i, min(i + size, K))] for i in range(0, K, size)]
    tree = node(first)
    for group in rest:
        tree = node([tree, *group])
    return tree


def pairs(k):
    return node([node([leaf(k), leaf(k + 1)]), node([leaf(k + 2), leaf(k + 3)])])


WORDS = {
    "one product after another, k ascending": ascending(range(16)),
    "one product after another, k descending": chain([leaf(k) for k in range(15, -1, -1)]),
    "one product after another, in the order of k 0 1 3 2": chain([leaf(k) for k in (0, 1, 3, 2)]),
    "all 16 products at once": groups(16, 16),
    "groups of 4 at once, k ascending": groups(4, 16),
    "groups of 16 at once, k ascending": groups(16, 70),
    "groups of 4, each by pairs, then the pairs, k ascending": chain([pairs(k) for k in range(0, 16, 4)]),
    "2 slices of 8, each (one product after another, k ascending), k ascending": node(
        [ascending(range(8)), ascending(range(8, 16))]),
    "4 sums of every 4th product, each one product after another, k ascending; then (((0 1) 2) 3)": chain(
        [ascending(range(i, 16, 4)) for i in range(4)]),
    "2 slices of 8, each (2 slices of 4, each (one product after another, k ascending), k ascending), k ascending": node(
        [node([ascending(range(i, i + 4)), ascending(range(i + 4, i + 8))]) for i in (0, 8)]),
    "groups of 8, each (2 sums of every second product, each one product after another, k ascending; then (0 1)), "
    "k ascending": chain([node([ascending(range(i, i + 8, 2)), ascending(range(i + 1, i + 8, 2))])
                          for i in range(0, 24, 8)]),
    "4 sums of every 4th product, each one product after another, k ascending; then ((0 2) (1 3))": node(
        [node([ascending(range(i, 16, 4)), ascending(range(i + 2, 16, 4))]) for i in (0, 1)]),
    "4 slices of K, each one product after another, k ascending; then ((0 2) (1 3))": node(
        [node([ascending(range(i, i + 4)), ascending(range(i + 8, i + 12))]) for i in (0, 4)]),
    "no order with a name: (((0 5) 2) ((1 4) 3))": node(
        [node([node([leaf(0), leaf(5)]), leaf(2)]), node([node([leaf(1), leaf(4)]), leaf(3)])]),
    "one product": leaf(0),
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_an_order_is_described(words):
    assert described(WORDS[words]) == words


@settings(max_examples=200, deadline=None)
@given(any_tree(24))
def test_every_order_has_a_description_and_a_growing_sum(tree):
    assert described(tree)
    moments = spine(tree)
    assert sorted(itertools.chain.from_iterable(child.leaves for each in moments for child in each)) == list(
        tree.leaves
    )
    i, j = meeting(tree)
    assert i != j
    assert 1 <= fused(tree) <= len(tree.leaves)


def test_a_long_chain_is_no_trouble():
    tree = leaf(0)
    for k in range(1, 3000):
        tree = node([tree, leaf(k)])
    assert described(tree) == "one product after another, k ascending"
    assert tree.text.startswith("(((")
    assert along(ascending(range(4)), [1, 1, 1, 1], 24, "even") == 4
