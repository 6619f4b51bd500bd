# SPDX-License-Identifier: Apache-2.0
"""Trees in words, and the moments at which a sum grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probe_kernels import chain

from hal.matrix_unit import MatrixUnit
from hal.probe.order import described, fused, largest_group, meeting, spine
from hal.probe.schedule import additions
from hal.probe.tree import leaf, node


def moved(tree, by):
    """Return the same tree over other products."""
    return leaf(by(tree.leaves[0])) if tree.is_leaf else node([moved(child, by) for child in tree.children])


def at_once(*ks):
    return node([leaf(k) for k in ks])


def grown(first, *groups):
    """Return groups that are added to one sum, each at once."""
    tree = at_once(*first)
    for group in groups:
        tree = node([tree, *(leaf(k) for k in group)])
    return tree


PAIRWISE = MatrixUnit("pairwise", 4)
LANES = node([moved(chain(range(4)), lambda k: 2 * k), moved(chain(range(4)), lambda k: 2 * k + 1)])
FOUR_LANES = [moved(chain(range(4)), lambda k, lane=lane: 4 * k + lane) for lane in range(4)]
SLICES = [moved(chain(range(4)), lambda k, at=at: k + 4 * at) for at in range(4)]
IRREGULAR = node([node([leaf(0), at_once(1, 4, 6)]), node([leaf(2), leaf(3)]), leaf(5)])

WORDS = {
    "one product": leaf(0),
    "all 5 products at once": at_once(*range(5)),
    "one product after another, k ascending": chain(range(8)),
    "one product after another, k descending": chain(range(8)[::-1]),
    "one product after another, in the order of k 0 2 4 6 1 3 5 7": chain([0, 2, 4, 6, 1, 3, 5, 7]),
    "groups of 4 at once, k ascending": grown(range(4), range(4, 8), range(8, 12)),
    "groups of 4 at once, in the order of k 8 4 0": grown(range(8, 12), range(4, 8), range(4)),
    "2 slices of 4 at once, k ascending": grown(range(4), range(4, 8)),
    "groups of 4, each by pairs, then the pairs, k ascending": additions(PAIRWISE, range(16)),
    "groups of 2, each a pair, k ascending": additions(MatrixUnit("pairwise", 2), range(8)),
    "2 sums of every second product, each one product after another, k ascending; then (0 1)": LANES,
    "4 sums of every 4th product, each one product after another, k ascending; then ((0 1) (2 3))":
        node([node(FOUR_LANES[:2]), node(FOUR_LANES[2:])]),
    "4 sums of every 4th product, each one product after another, k ascending; then ((0 2) (1 3))":
        node([node(FOUR_LANES[::2]), node(FOUR_LANES[1::2])]),
    "2 slices of 8, each (2 slices of 4, each (one product after another, k ascending), k ascending), k ascending":
        node([node(SLICES[:2]), node(SLICES[2:])]),
    "4 slices of K, each one product after another, k ascending; then (0 1 2 3)": node(SLICES),
    "4 slices of K, each one product after another, k ascending; then ((0 2) (1 3))":
        node([node(SLICES[::2]), node(SLICES[1::2])]),
    "4 sums of every 4th product, each one product after another, k ascending; then (((0 1) 2) 3)":
        node([node([node(FOUR_LANES[:2]), FOUR_LANES[2]]), FOUR_LANES[3]]),
    "groups of 8, each (2 sums of every second product, each one product after another, k ascending; then (0 1)), "
    "k ascending":
        node([node([LANES, moved(LANES, lambda k: k + 8)]), moved(LANES, lambda k: k + 16)]),
    "no order with a name: ((0 (1 4 6)) (2 3) 5)": IRREGULAR,
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_an_order_has_a_name(words):
    assert described(WORDS[words]) == words


def test_the_last_group_may_be_a_rest():
    assert described(additions(MatrixUnit("truncated", 8), range(20))) == "groups of 8 at once, k ascending"


def test_a_long_order_without_a_name_is_cut():
    spread = [k * 37 % 64 for k in range(64)]
    words = described(node([chain(spread[:21]), chain(spread[21:])]))
    assert words.startswith("no order with a name: (")
    assert words.endswith(" ...")
    assert len(words) < 90
    assert described(chain(spread)).endswith(" ...")


@pytest.mark.parametrize("K", [1024, 4096])
def test_an_order_of_any_length_has_a_name(K):
    half = K // 2
    slices = [chain(range(half)), chain(range(half, K))]
    lanes = [chain(range(0, K, 2)), chain(range(1, K, 2))]
    assert described(chain(range(K))) == "one product after another, k ascending"
    assert described(node(slices)).endswith("one product after another, k ascending), k ascending")
    assert described(node(lanes)).startswith("2 sums of every second product, each one product after another")


def test_the_moments_of_a_matrix_unit():
    tree = additions(MatrixUnit("truncated", 4), range(12))
    assert [[child.leaves for child in moment] for moment in spine(tree)] == [
        [(0,), (1,), (2,), (3,)], [(4,), (5,), (6,), (7,)], [(8,), (9,), (10,), (11,)],
    ]  # fmt: skip
    assert fused(tree) == 4
    assert meeting(tree) in [(0, 1), (4, 5), (8, 9)]


def test_the_moments_of_a_chain():
    tree = chain([3, 1, 2, 0])
    assert {child.leaves[0] for moment in spine(tree)[:2] for child in moment} == {1, 3}
    assert [child.leaves[0] for moment in spine(tree)[2:] for child in moment] == [2, 0]
    assert fused(tree) == 1
    assert largest_group(tree) == []
    assert set(meeting(tree)) == {1, 3}


@st.composite
def random_trees(draw):
    parts = [leaf(k) for k in draw(st.integers(2, 20).flatmap(lambda K: st.permutations(range(K))))]
    while len(parts) > 1:
        count = draw(st.integers(2, min(5, len(parts))))
        at = draw(st.integers(0, len(parts) - count))
        parts[at : at + count] = [node(parts[at : at + count])]
    return parts[0]


@given(random_trees())
def test_every_tree_has_words_and_moments_with_each_product_once(tree):
    assert described(tree)
    moments = spine(tree)
    assert sorted(k for moment in moments for child in moment for k in child.leaves) == list(tree.leaves)
    one, other = meeting(tree)
    assert one != other
    group = largest_group(tree)
    assert len(group) in (0, fused(tree))
