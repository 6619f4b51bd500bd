# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine: every slot has its row, in a fixed order, and the way back sums in a fixed order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hal.errors import ShapeError
from hal.moe.torch_ops import torch_ops


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Experts [T, K], distinct within a token, and E; T may be 0, and experts may be empty."""
    num_experts = draw(st.integers(1, 9))
    num_choices = draw(st.integers(1, num_experts))
    tokens = draw(st.lists(st.permutations(range(num_experts)), max_size=12))
    rows = [order[:num_choices] for order in tokens]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), num_choices), num_experts


def _tokens(num_tokens: int, width: int = 3) -> Tensor:
    return torch.arange(1.0, num_tokens * width + 1).view(num_tokens, width)


@settings(deadline=None, max_examples=100)
@given(routing=routings())
def test_rows_are_sorted_by_expert_then_slot_and_counted(routing: tuple[Tensor, int]) -> None:
    experts_TK, num_experts = routing
    x_TD = _tokens(len(experts_TK))
    sent = torch_ops.dispatch(x_TD, experts_TK, num_experts)
    flat = experts_TK.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda s: (flat[s], s))
    assert sent.slot_R.tolist() == order
    assert sent.counts_E.tolist() == [flat.count(e) for e in range(num_experts)]
    assert sent.x_RD.tolist() == [x_TD[s // experts_TK.shape[1]].tolist() for s in order]


@settings(deadline=None, max_examples=100)
@given(routing=routings(), capacity=st.integers(0, 6))
def test_a_capacity_keeps_the_first_slots_of_each_expert(routing: tuple[Tensor, int], capacity: int) -> None:
    experts_TK, num_experts = routing
    sent = torch_ops.dispatch(_tokens(len(experts_TK)), experts_TK, num_experts, capacity=capacity)
    flat = experts_TK.reshape(-1).tolist()
    kept = [s for e in range(num_experts) for s in [i for i, f in enumerate(flat) if f == e][:capacity]]
    assert sent.slot_R.tolist() == kept
    assert sent.counts_E.tolist() == [min(flat.count(e), capacity) for e in range(num_experts)]
    assert len(sent.x_RD) == len(kept)


@settings(deadline=None, max_examples=100)
@given(routing=routings(), data=st.data())
def test_combining_what_was_dispatched_with_one_hot_weights_is_the_identity(
    routing: tuple[Tensor, int],
    data: st.DataObject,
) -> None:
    experts_TK, num_experts = routing
    num_tokens, num_choices = experts_TK.shape
    x_TD = _tokens(num_tokens)
    sent = torch_ops.dispatch(x_TD, experts_TK, num_experts)
    hot = torch.tensor([data.draw(st.integers(0, num_choices - 1)) for _ in range(num_tokens)], dtype=torch.int64)
    weights_TK = torch.nn.functional.one_hot(hot, num_choices).float()
    assert torch.equal(torch_ops.combine(sent.x_RD, weights_TK, sent.slot_R, num_tokens), x_TD)


@settings(deadline=None, max_examples=100)
@given(routing=routings(), data=st.data())
def test_permuting_the_tokens_permutes_the_result(routing: tuple[Tensor, int], data: st.DataObject) -> None:
    experts_TK, num_experts = routing
    order = torch.tensor(data.draw(st.permutations(range(len(experts_TK)))), dtype=torch.int64)
    x_TD, weights_TK = _tokens(len(experts_TK)), experts_TK.float() / 7 + 0.1

    def through(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        sent = torch_ops.dispatch(x_TD, experts_TK, num_experts)
        return torch_ops.combine(sent.x_RD, weights_TK, sent.slot_R, len(x_TD))

    plain = through(x_TD, experts_TK, weights_TK)
    assert torch.equal(through(x_TD[order], experts_TK[order], weights_TK[order]), plain[order])


def test_all_tokens_on_one_expert_is_a_plain_copy() -> None:
    x_TD = _tokens(5)
    sent = torch_ops.dispatch(x_TD, torch.full((5, 1), 2), 4)
    assert torch.equal(sent.x_RD, x_TD)
    assert sent.counts_E.tolist() == [0, 0, 5, 0]


def test_combine_adds_over_the_choices_in_their_order_in_float32() -> None:
    # (2**24 + 1) - 2**24 is 0 in float32 from left to right; any other order gives 1.
    y_RD = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    assert torch_ops.combine(y_RD, torch.ones(1, 3), torch.arange(3), 1).item() == 0.0
    assert torch_ops.combine(y_RD[[0, 2, 1]], torch.ones(1, 3), torch.arange(3), 1).item() == 1.0
    # The row's position does not matter, the choice's does.
    assert torch_ops.combine(y_RD[[1, 0, 2]], torch.ones(1, 3), torch.tensor([1, 0, 2]), 1).item() == 0.0


def test_combine_of_bfloat16_rows_rounds_once_at_the_end() -> None:
    y_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 = 256 in bfloat16
    got = torch_ops.combine(y_RD, torch.ones(1, 3), torch.arange(3), 1)
    assert got.dtype == torch.bfloat16
    assert got.item() == 258.0


def test_the_gradient_of_a_token_is_summed_over_its_choices_in_their_order_in_float32() -> None:
    x_TD = torch.zeros(1, 1, requires_grad=True)
    sent = torch_ops.dispatch(x_TD, torch.tensor([[2, 0, 1]]), 3)
    assert sent.slot_R.tolist() == [1, 2, 0]
    # By choice: 2**24, 1, -2**24, which is 0; by row it would be 1, -2**24, 2**24, which is 1.
    (grad,) = torch.autograd.grad(sent.x_RD, x_TD, torch.tensor([[1.0], [-(2.0**24)], [2.0**24]]))
    assert grad.item() == 0.0


def test_a_dropped_slot_adds_nothing_and_its_weight_has_no_gradient() -> None:
    weights_TK = torch.tensor([[2.0, float("inf")], [3.0, float("nan")]], requires_grad=True)
    y_RD = torch.tensor([[5.0], [7.0]], requires_grad=True)
    out_TD = torch_ops.combine(y_RD, weights_TK, torch.tensor([0, 2]), 2)
    assert out_TD.tolist() == [[10.0], [21.0]]
    out_TD.sum().backward()
    assert weights_TK.grad is not None
    assert y_RD.grad is not None
    assert weights_TK.grad.tolist() == [[5.0, 0.0], [7.0, 0.0]]
    assert y_RD.grad.tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_reaches_its_own_token_only(value: float) -> None:
    experts_TK = torch.tensor([[0, 1], [1, 2], [2, 0]])
    x_TD = _tokens(3)
    x_TD[1, 0] = value
    sent = torch_ops.dispatch(x_TD, experts_TK, 3)
    got = torch_ops.combine(sent.x_RD, torch.full((3, 2), 0.5), sent.slot_R, 3)
    assert torch.equal(got[[0, 2]], _tokens(3)[[0, 2]])
    assert not got[1, 0].isfinite()
    assert got[1, 1:].tolist() == _tokens(3)[1, 1:].tolist()


@pytest.mark.parametrize("capacity", [None, 2, 0])
def test_gradients_through_dispatch_and_combine_are_right(capacity: int | None) -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0]])
    x_TD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def through(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        sent = torch_ops.dispatch(x_TD, experts_TK, 4, capacity=capacity)
        return torch_ops.combine(sent.x_RD.square(), weights_TK, sent.slot_R, 4)

    assert torch.autograd.gradcheck(through, (x_TD, weights_TK))
    assert torch.autograd.gradgradcheck(through, (x_TD, weights_TK))


def test_zero_tokens_have_zero_rows_and_a_gradient() -> None:
    x_TD = torch.zeros(0, 3, requires_grad=True)
    sent = torch_ops.dispatch(x_TD, torch.zeros(0, 2, dtype=torch.int64), 4)
    assert sent.counts_E.tolist() == [0, 0, 0, 0]
    out_TD = torch_ops.combine(sent.x_RD, torch.zeros(0, 2), sent.slot_R, 0)
    assert out_TD.shape == (0, 3)
    out_TD.sum().backward()
    assert x_TD.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    x_TD, experts_TK = torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64)
    for call in (
        lambda: torch_ops.dispatch(x_TD[0], experts_TK, 2),
        lambda: torch_ops.dispatch(x_TD, experts_TK[:2], 2),
        lambda: torch_ops.dispatch(x_TD, experts_TK.float(), 2),
        lambda: torch_ops.dispatch(x_TD, experts_TK + 2, 2),
        lambda: torch_ops.dispatch(x_TD, experts_TK - 1, 2),
        lambda: torch_ops.dispatch(x_TD, experts_TK, 0),
        lambda: torch_ops.dispatch(x_TD, experts_TK, 2, capacity=-1),
    ):
        with pytest.raises(ShapeError, match="dispatch"):
            call()
    weights_TK, slot_R = torch.ones(3, 1), torch.arange(3)
    for call in (
        lambda: torch_ops.combine(x_TD, weights_TK, slot_R, 4),
        lambda: torch_ops.combine(x_TD, weights_TK, slot_R[:2], 3),
        lambda: torch_ops.combine(x_TD, weights_TK, slot_R + 1, 3),
        lambda: torch_ops.combine(x_TD, weights_TK, slot_R - 1, 3),
        lambda: torch_ops.combine(x_TD, weights_TK, slot_R.float(), 3),
        lambda: torch_ops.combine(x_TD, weights_TK.long(), slot_R, 3),
        lambda: torch_ops.combine(x_TD, weights_TK, torch.tensor([0, 1, 1]), 3),
    ):
        with pytest.raises(ShapeError, match="combine"):
            call()
