# SPDX-License-Identifier: Apache-2.0
"""Certificates of routing against brute force over everything that the intervals admit."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hal.moe.router_spec import RouterSpec
from hal_conformance.bounds import Bounded
from hal_conformance.margins import Certainty, certify, judge_choice, k_best
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
