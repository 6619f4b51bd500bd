# SPDX-License-Identifier: Apache-2.0
"""The balance loss and the z-loss, by hand and by their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hal.errors import ShapeError
from hal.moe import RouterSpec, preset
from hal.moe.torch_ops import torch_ops

SOFTMAX = RouterSpec(num_experts=4, top_k=2)
SIGMOID = RouterSpec(num_experts=4, top_k=2, score="sigmoid")


def test_even_routing_has_a_balance_loss_of_one() -> None:
    even = torch_ops.aux_loss(torch.full((2, 4), 0.25), torch.tensor([[0, 1], [2, 3]]), SOFTMAX)
    assert (even.item(), even.dtype) == (1.0, torch.float32)


def test_a_collapsed_router_has_a_balance_loss_of_experts_over_choices() -> None:
    # counts 2, 2, 0, 0; mean p 1/2, 1/2, 0, 0; 4 / (2 * 2) * (2/2 + 2/2) = 2
    scores_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2)
    assert torch_ops.aux_loss(scores_TE, torch.tensor([[0, 1], [1, 0]]), SOFTMAX).item() == 2.0


def test_sigmoid_scores_are_divided_by_their_sum_over_all_experts() -> None:
    # p = 1/2, 1/4, 1/4, 0; counts 1, 1, 0, 0; 4 / (2 * 1) * (1/2 + 1/4) = 1.5
    scores_TE = torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    assert torch_ops.aux_loss(scores_TE, torch.tensor([[0, 1]]), SIGMOID).item() == 1.5


def test_scores_that_all_vanish_do_not_divide_by_zero() -> None:
    assert torch_ops.aux_loss(torch.zeros(1, 4), torch.tensor([[0, 1]]), SIGMOID).item() == 0.0


def test_the_z_loss_of_equal_logits_is_the_square_of_the_log_of_their_number() -> None:
    got = torch_ops.z_loss(torch.zeros(3, 4, dtype=torch.bfloat16))
    assert got.dtype == torch.float32
    # exp, three additions, log (2 roundings each at most), square doubles it, three more for the mean: below 32.
    assert got.item() == pytest.approx(math.log(4) ** 2, rel=32 * 2.0**-24)


def test_large_logits_do_not_overflow_the_z_loss() -> None:
    assert torch_ops.z_loss(torch.tensor([[1024.0, -1024.0]])).item() == 1024.0**2


def test_zero_tokens_have_losses_of_zero_with_gradients() -> None:
    scores_TE = torch.zeros(0, 4, requires_grad=True)
    for loss in (
        torch_ops.aux_loss(scores_TE, torch.zeros(0, 2, dtype=torch.int64), SOFTMAX),
        torch_ops.z_loss(scores_TE),
    ):
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, scores_TE)
        assert grad.shape == (0, 4)


@pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID])
def test_the_gradients_of_the_losses_are_right(spec: RouterSpec) -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, 3]])

    def balance(logits_TE: Tensor) -> Tensor:
        scores_TE = logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()
        return torch_ops.aux_loss(scores_TE, experts_TK, spec)

    assert torch.autograd.gradcheck(balance, (logits_TE,))
    assert torch.autograd.gradcheck(torch_ops.z_loss, (logits_TE,))


def test_what_does_not_fit_is_refused() -> None:
    scores_TE, experts_TK = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    for call in (
        lambda: torch_ops.aux_loss(scores_TE[:, :3], experts_TK, SOFTMAX),
        lambda: torch_ops.aux_loss(scores_TE, experts_TK[:2], SOFTMAX),
        lambda: torch_ops.aux_loss(scores_TE, experts_TK[:, :1], SOFTMAX),
        lambda: torch_ops.aux_loss(scores_TE, experts_TK + 4, SOFTMAX),
        lambda: torch_ops.aux_loss(scores_TE, experts_TK.float(), SOFTMAX),
        lambda: torch_ops.aux_loss(scores_TE.long(), experts_TK, SOFTMAX),
        lambda: torch_ops.z_loss(scores_TE[0]),
        lambda: torch_ops.z_loss(scores_TE[:, :0]),
        lambda: torch_ops.z_loss(scores_TE.long()),
    ):
        with pytest.raises(ShapeError, match="_loss"):
            call()


# --- the published losses, written from their code -----------------------------------------------------------------


def _hugging_face(logits_TE: Tensor, top_k: int) -> Tensor:
    """transformers, models/mixtral: load_balancing_loss_func without a mask; all layers' tokens in one tensor."""
    num_experts = logits_TE.shape[1]
    probabilities_TE = logits_TE.softmax(-1)
    chosen_TK = probabilities_TE.topk(top_k, -1).indices
    tokens_per_expert_KE = torch.nn.functional.one_hot(chosen_TK, num_experts).double().mean(0)
    return num_experts * (tokens_per_expert_KE * probabilities_TE.mean(0)[None]).sum()


def _megablocks(logits_TE: Tensor, top_k: int) -> Tensor:
    """megablocks, layers/moe.py: batched_load_balancing_loss of one layer, without its weight."""
    num_tokens, num_experts = logits_TE.shape
    probabilities_TE = logits_TE.softmax(-1)
    counts_E = torch.bincount(probabilities_TE.topk(top_k, -1).indices.flatten(), minlength=num_experts)
    return num_experts / (num_tokens * top_k) * torch.dot(counts_E.double(), probabilities_TE.mean(0))


def _ours(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    scores_TE = logits_TE.softmax(-1)
    return torch_ops.aux_loss(scores_TE, scores_TE.topk(spec.top_k, -1).indices, spec)


@pytest.mark.parametrize(
    ("name", "loss", "published"),
    [
        ("mixtral-8x7b", _hugging_face, 0.02),  # router_aux_loss_coef of its config.json
        ("qwen2-moe", _hugging_face, 0.001),  # the same
        ("qwen3-moe", _hugging_face, 0.001),  # the same
        ("olmoe", _megablocks, 0.01),  # moe_loss_weight of its training configuration
    ],
)
def test_a_presets_coefficient_times_our_loss_is_the_published_loss(name: str, loss: Any, published: float) -> None:
    model = preset(name)
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(64, model.router.num_experts, dtype=torch.float64, generator=generator)
    assert model.balance_coefficient is not None
    got = model.balance_coefficient * _ours(logits_TE, model.router).item()
    # Sums of up to 128 positive terms in float64, twice.
    assert got == pytest.approx(published * loss(logits_TE, model.router.top_k).item(), rel=512 * 2.0**-53)


def test_over_several_layers_hugging_faces_loss_is_ours_of_all_their_tokens_together() -> None:
    model = preset("mixtral-8x7b")
    layers = torch.randn(3, 64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert model.balance_coefficient is not None
    got = model.balance_coefficient * _ours(layers.flatten(0, 1), model.router).item()
    assert got == pytest.approx(0.02 * _hugging_face(layers.flatten(0, 1), 2).item(), rel=512 * 2.0**-53)
    summed = sum(_ours(layer, model.router).item() for layer in layers)
    assert summed > 2.5 * got / model.balance_coefficient, "a sum over layers is another loss"
