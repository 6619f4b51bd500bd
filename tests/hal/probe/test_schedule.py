# SPDX-License-Identifier: Apache-2.0
"""Pieces of K that a library sums apart are found in a tree of additions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from probe_kernels import chain

from hal.matrix_unit import MatrixUnit
from hal.probe.schedule import Pieces, additions, described, pieces
from hal.probe.tree import node, parsed

UNITS = {
    "fused": MatrixUnit("fused"), "pairwise": MatrixUnit("pairwise", 4), "truncated": MatrixUnit("truncated", 8),
}  # fmt: skip


def summed(unit, stretches):
    """Return the sum of sums of these stretches, one after the other."""
    trees = [additions(unit, stretch) for stretch in stretches]
    at = trees[0]
    for tree in trees[1:]:
        at = node([at, tree])
    return at


@given(st.sampled_from(sorted(UNITS)), st.lists(st.integers(2, 6), min_size=1, max_size=5))
def test_slices_of_any_length_are_found(kind, lengths):
    ends = [sum(lengths[: i + 1]) * 8 for i in range(len(lengths))]
    stretches = [range(end - 8 * length, end) for end, length in zip(ends, lengths, strict=True)]
    found = pieces(summed(UNITS[kind], stretches), UNITS[kind], ends[-1])
    leaves = []
    while found.parts:
        found, last = found.parts
        leaves.append((last.start, last.end))
    assert [(found.start, found.end), *leaves[::-1]] == [(each.start, each.stop) for each in stretches]


@pytest.mark.parametrize("kind", UNITS)
def test_one_piece_is_no_schedule_and_has_no_words(kind):
    found = pieces(additions(UNITS[kind], range(64)), UNITS[kind], 64)
    assert found == Pieces(0, 64)
    assert described({64: found}) == ""


@pytest.mark.parametrize(
    "tree",
    [chain(range(64)[::-1]), chain([*range(0, 64, 2), *range(1, 64, 2)]), additions(UNITS["pairwise"], range(64)),
     additions(UNITS["truncated"], range(64)), node([chain(range(0, 64, 2)), chain(range(1, 64, 2))])],
    ids=["descending", "even, odd", "pairwise", "groups", "interleaved"],
)  # fmt: skip
def test_another_order_is_no_schedule(tree):
    assert pieces(tree, UNITS["fused"], 64) is None


def test_a_chain_of_any_length_is_looked_through():
    assert pieces(chain(range(3000)[::-1]), UNITS["fused"], 3000) is None
    assert pieces(chain([1, 2, 0, *range(3, 3000)]), UNITS["fused"], 3000) is None


def test_a_few_products_show_where_pieces_begin():
    tree = parsed("(((0 16) 32) ((48 64) 80))")
    found = pieces(tree, UNITS["truncated"], 96)
    assert found == Pieces(0, 96, (Pieces(0, 48), Pieces(48, 96)))
    assert described({96: found}) == "K = 96 in 2 slices of 48"
    assert pieces(parsed("(0 (16 (32 (48 (64 80)))))"), UNITS["truncated"], 96) is None
    assert pieces(tree, UNITS["truncated"], 112) is None  # of which the last is not there


@given(st.permutations(range(9)))
def test_a_tree_is_read_back_from_its_text(order):
    tree = node([chain(order[:4]), *chain(order[4:]).children])
    assert parsed(tree.text) == tree
