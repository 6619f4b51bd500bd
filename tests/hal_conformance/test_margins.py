# SPDX-License-Identifier: Apache-2.0
"""Certificates of routing against brute force over everything that the intervals admit."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hal.moe.router_spec import RouterSpec
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.margins import Certainty, certify, judge_choice, k_best
from hal_conformance.verdicts import Status


@given(st.data())
def test_what_must_be_chosen_is_chosen_by_every_admitted_device_and_nothing_else_is_possible(data):
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    k = min(n, k)
    centre = np.array(data.draw(st.lists(st.integers(0, 8), min_size=n, max_size=n)), float)
    radius = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n)))
    found = k_best(centre - radius, centre + radius, k)
    # Ends and just inside them are enough: only the order of the scores counts.
    options = [
        sorted({c - r, c - r + 0.25, c, c + r - 0.25, c + r}) if r else [c] for c, r in zip(centre, radius, strict=True)
    ]
    chosen = [set(np.argsort(-np.array(s), kind="stable")[:k].tolist()) for s in itertools.product(*options)]
    assert set(np.flatnonzero(found.must)) <= set.intersection(*chosen)
    assert set(np.flatnonzero(found.may)) >= set.union(*chosen)


def test_with_exact_scores_nothing_is_open():
    scores = Bounded.exact(np.array([[3.0, 1.0, 3.0, 2.0]]))
    certain = certify(scores, None, RouterSpec(num_experts=4, top_k=2))
    assert certain.must.tolist() == certain.may.tolist() == [[True, False, True, False]]


def test_an_exact_tie_goes_to_the_lower_index():
    certain = certify(Bounded.exact(np.ones((1, 4))), None, RouterSpec(num_experts=4, top_k=2))
    assert certain.may.tolist() == [[True, True, False, False]]


def test_an_open_group_opens_its_experts():
    spec = RouterSpec(num_experts=4, top_k=1, num_groups=2, top_groups=1)
    value = np.array([[5.0, 0.0, 5.1, 0.0]])
    bound = np.array([[0.2, 0.0, 0.2, 0.0]])
    certain = certify(Bounded(value, bound, bound**2), None, spec)
    assert certain.may[0, [0, 2]].all()
    assert not certain.must.any()


def test_a_token_that_is_certain_must_be_right_and_an_open_one_may_choose():
    certain = Certainty(
        np.array([[True, False, False], [False] * 3]), np.array([[True, False, False], [True, True, False]])
    )
    assert judge_choice(np.array([[0], [1]]), certain).status is Status.PASS_AMBIGUOUS
    assert judge_choice(np.array([[1], [1]]), certain).status is Status.FAIL_DISCRETE
    assert judge_choice(np.array([[0], [2]]), certain).status is Status.FAIL_DISCRETE
    assert judge_choice(np.array([[0], [3]]), certain).status is Status.FAIL_DISCRETE
    assert judge_choice(np.array([[0], [-1]]), certain).status is Status.FAIL_DISCRETE


def selection(scores, spec):
    """Choose as the operator defines it: groups first, then experts, each with ties to the lower index."""
    kept = scores.copy()
    if spec.num_groups > 1:
        grouped = scores.reshape(spec.num_groups, spec.group_size)
        worth = grouped.max(-1) if spec.group_score == "max" else np.sort(grouped, -1)[:, -2:].sum(-1)
        best = np.argsort(-worth, kind="stable")[: spec.top_groups]
        outside = ~np.isin(np.arange(spec.num_experts) // spec.group_size, best)
        kept[outside] = spec.masked_score
    return np.argsort(-kept, kind="stable")[: spec.top_k]


@given(st.data())
def test_whatever_scores_within_the_bound_choose_is_right_with_groups_and_without(data):
    groups = data.draw(st.sampled_from([1, 2, 4]))
    spec = RouterSpec(
        num_experts=8, top_k=data.draw(st.integers(1, 2)), num_groups=groups,
        top_groups=data.draw(st.integers(1, min(groups, 2))),
        group_score=data.draw(st.sampled_from(["max", "top2_sum"])),
    )  # fmt: skip
    rows = [[data.draw(st.integers(1, 30)) / 8 for _ in range(8)] for _ in range(3)]
    value = np.array(rows)
    radius = np.array([[data.draw(st.sampled_from([0.01, 0.5, 1.0])) for _ in range(8)] for _ in range(3)])
    shift = np.array([[data.draw(st.floats(-1, 1)) for _ in range(8)] for _ in range(3)])
    device = value + 0.999 * radius * shift
    chosen = np.stack([selection(row, spec) for row in device])
    finding = judge_choice(chosen, certify(Bounded(value, radius, radius**2), None, spec))
    assert finding.status in (Status.PASS, Status.PASS_AMBIGUOUS), finding.detail


def test_experts_of_two_groups_of_which_one_can_win_are_no_set():
    spec = RouterSpec(num_experts=4, top_k=2, num_groups=2, top_groups=1)
    value = np.array([[5.0, 4.9, 5.0, 4.9]])
    bound = np.full_like(value, 0.2)
    certain = certify(Bounded(value, bound, bound**2), None, spec)
    assert certain.may.all(), "each may be chosen"
    assert judge_choice(np.array([[0, 1]]), certain).status is Status.PASS_AMBIGUOUS
    assert judge_choice(np.array([[2, 3]]), certain).status is Status.PASS_AMBIGUOUS
    mixed = judge_choice(np.array([[0, 2]]), certain)
    assert mixed.status is Status.FAIL_DISCRETE
    assert "not all of them at once" in mixed.detail


def test_choices_come_in_descending_order_where_the_margin_tells():
    value = np.array([[3.0, 2.0, 1.0, 0.95]])
    bound = np.full_like(value, 0.1)
    certain = certify(Bounded(value, bound, bound**2), None, RouterSpec(num_experts=4, top_k=3))
    assert judge_choice(np.array([[0, 1, 2]]), certain).status is Status.PASS_AMBIGUOUS
    assert judge_choice(np.array([[0, 1, 3]]), certain).status is Status.PASS_AMBIGUOUS
    wrong = judge_choice(np.array([[1, 0, 2]]), certain)
    assert wrong.status is Status.FAIL_DISCRETE
    assert "comes first" in wrong.detail
