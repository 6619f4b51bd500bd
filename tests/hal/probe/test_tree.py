# SPDX-License-Identifier: Apache-2.0
"""A tree of additions is found again from outside; where there is none, that is said."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe_kernels import along, chain, multiplier, one_after_another

from hal.probe import tree as trees
from hal.probe.tree import NoTree, leaf, node, summation_tree


@st.composite
def random_trees(draw, most=24):
    leaves = draw(st.integers(3, most).flatmap(lambda K: st.permutations(range(K))))

    def grown(part):
        if len(part) == 1:
            return leaf(part[0])
        count = draw(st.integers(2, min(5, len(part))))
        inside = st.integers(1, len(part) - 1)
        cuts = sorted(draw(st.lists(inside, min_size=count - 1, max_size=count - 1, unique=True)))
        return node([grown(part[i:j]) for i, j in zip([0, *cuts], [*cuts, len(part)], strict=True)])

    return grown(list(leaves))


@given(random_trees())
def test_any_tree_is_found_from_all_pairs(tree):
    assert summation_tree(multiplier(along(tree)), len(tree.leaves)).text == tree.text


@given(random_trees())
def test_any_tree_is_found_by_recursion(tree):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "ALL_PAIRS", 2)
        multiply = multiplier(along(tree))
        assert summation_tree(multiply, len(tree.leaves)).text == tree.text


@given(random_trees(12), st.sampled_from(["float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]))
def test_any_tree_is_found_in_any_format(tree, format):
    assert summation_tree(multiplier(along(tree), format), len(tree.leaves)).text == tree.text


@pytest.mark.parametrize(("format", "K"), [("float8_e4m3fn", 40), ("float8_e5m2fnuz", 300), ("float16", 300)])
def test_ones_are_counted_block_by_block_where_there_is_no_room_for_all(format, K):
    assert summation_tree(multiplier(one_after_another(), format), K).text == chain(range(K)).text


@pytest.mark.parametrize("bits", [24, 27, 30])
def test_an_accumulator_of_up_to_thirty_bits_loses_the_ones(bits):
    tree = chain(range(9))
    assert summation_tree(multiplier(along(tree, bits), "float8_e4m3fn"), 9).text == tree.text


def test_recursion_takes_far_fewer_products_than_all_pairs(monkeypatch):
    tree = chain(range(96))
    by_pairs, by_recursion = multiplier(one_after_another()), multiplier(one_after_another())
    monkeypatch.setattr(trees, "ALL_PAIRS", 96)
    assert summation_tree(by_pairs, 96).text == tree.text
    monkeypatch.setattr(trees, "ALL_PAIRS", 2)
    assert summation_tree(by_recursion, 96).text == tree.text
    assert by_recursion.calls[0] < by_pairs.calls[0] / 2


@given(random_trees(), st.integers(0, 3))
def test_the_tree_of_a_few_products_is_what_the_whole_one_leaves_of_them(tree, first):
    few = range(first, len(tree.leaves), 3)

    def left(at):
        if at.is_leaf:
            return at if at.leaves[0] in few else None
        children = [child for child in map(left, at.children) if child is not None]
        return node(children) if len(children) > 1 else next(iter(children), None)

    wanted = left(tree)
    if len(few) > 2:
        assert summation_tree(multiplier(along(tree)), len(tree.leaves), few).text == wanted.text


def test_rows_with_an_order_of_their_own_are_found_beyond_all_pairs_too():
    up, down = one_after_another(), one_after_another(order=lambda K: range(K)[::-1])

    def halves(products):
        return np.concatenate([up(products[:, :32]), down(products[:, 32:])])

    with pytest.raises(NoTree):
        summation_tree(multiplier(halves), trees.ALL_PAIRS + 8)


def test_one_product_and_two_are_trees_without_a_question_of_order():
    assert summation_tree(multiplier(one_after_another()), 1) == leaf(0)
    assert summation_tree(multiplier(one_after_another()), 2) == node([leaf(0), leaf(1)])


def test_equal_trees_have_one_text_and_others_another():
    one = node([leaf(2), node([leaf(1), leaf(0)])])
    other = node([node([leaf(0), leaf(1)]), leaf(2)])
    assert one == other
    assert one.text == other.text == "((0 1) 2)"
    assert node([leaf(0), node([leaf(1), leaf(2)])]).text == "(0 (1 2))"


def test_the_text_of_a_chain_of_any_length():
    text = chain(range(5000)).text
    assert text.startswith("(((((")
    assert text.endswith(" 4998) 4999)")


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e4m3fnuz", "float16"])
def test_exact_sums_have_no_tree(format):
    # Their products and sums are whole in float64.
    with pytest.raises(NoTree, match="sums are exact, or wider"):
        summation_tree(multiplier(lambda products: products.sum(0), format), 16)


def test_sums_of_rational_numbers_have_no_tree():
    def exact(products):
        return np.array([[float(sum(map(int, column))) for column in row] for row in products.transpose(1, 2, 0)])

    with pytest.raises(NoTree, match="sums are exact, or wider"):
        summation_tree(multiplier(exact, outer=8), 5)


def test_an_order_that_changes_from_run_to_run_is_no_tree():
    rng = np.random.default_rng(0)
    multiply = multiplier(one_after_another(order=rng.permutation))
    with pytest.raises(NoTree):
        summation_tree(multiply, 12)


def test_an_order_that_changes_from_run_to_run_is_found_out_by_recursion_or_gives_wrong_sizes(monkeypatch):
    monkeypatch.setattr(trees, "ALL_PAIRS", 2)
    rng = np.random.default_rng(1)
    with pytest.raises(NoTree):
        summation_tree(multiplier(one_after_another(order=rng.permutation)), 24)


def test_rows_with_an_order_of_their_own_are_no_tree():
    up, down = one_after_another(), one_after_another(order=lambda K: range(K)[::-1])

    def halves(products):
        return np.concatenate([up(products[:, :32]), down(products[:, 32:])])

    with pytest.raises(NoTree, match="orders of their own"):
        summation_tree(multiplier(halves), 8)


def test_an_answer_that_is_no_count_is_no_tree():
    with pytest.raises(NoTree, match="ones were counted"):
        summation_tree(multiplier(lambda products: products.sum(0) + 0.5, "float32"), 8)
    with pytest.raises(NoTree, match="nan of 6 ones"):
        summation_tree(multiplier(lambda products: products.sum(0) * np.nan, "float32"), 8)


def test_sums_that_lose_the_huge_numbers_only_in_part_are_no_tree():
    def both(products):  # the upper half twice, in another order, and the mean of the two
        return (one_after_another()(products) + one_after_another(order=lambda K: range(K)[::-1])(products)) / 2

    with pytest.raises(NoTree):
        summation_tree(multiplier(both), 9)


def test_torch_itself_adds_float64_along_some_tree():
    from hal.probe.multiplier import Multiplier

    multiply = Multiplier("float64", torch.device("cpu"), torch.mm, torch.float64, torch.float64)
    assert summation_tree(multiply, 16).leaves == tuple(range(16))


def test_trees_as_deep_as_a_chain_are_compared_hashed_and_shown():
    one, other, shorter = (chain(range(length)) for length in (3000, 3000, 2999))
    assert one == other
    assert hash(one) == hash(other)
    assert one != shorter
    assert one != "Tree"
    assert repr(one).startswith("Tree((((")
