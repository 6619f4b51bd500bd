# SPDX-License-Identifier: Apache-2.0
"""The layer of every preset, forward and backward, token by token and with bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hal.errors import ShapeError
from hal.moe import PRESETS, ExpertWeights, LayerWeights, MoEModelSpec, RouterSpec, SharedWeights, preset
from hal.moe.torch_ops import TorchMoEOps, torch_ops


def _weights(spec: MoEModelSpec, dtype: torch.dtype = torch.float32) -> LayerWeights:
    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).div(shape[-1] ** 0.5).requires_grad_()

    experts, width = spec.router.num_experts, spec.hidden_size
    hidden, shared = spec.expert_hidden_size, spec.shared_hidden_size
    return LayerWeights(
        gate_ED=matrix(experts, width),
        bias_E=torch.randn(experts) / 16 if spec.router.selection_bias else None,
        experts=ExpertWeights(
            matrix(experts, hidden, width),
            matrix(experts, hidden, width),
            matrix(experts, width, hidden),
        ),
        shared=SharedWeights(matrix(shared, width), matrix(shared, width), matrix(width, shared)) if shared else None,
        shared_gate_D=matrix(width) if spec.shared_gate else None,
    )


def _tiny(shared: int, *, gate: bool, sigmoid: bool) -> MoEModelSpec:
    router = RouterSpec(
        num_experts=4,
        top_k=2,
        score="sigmoid" if sigmoid else "softmax",
        num_groups=2,
        top_groups=2,
        selection_bias=sigmoid,
        scaling_factor=2.5,
    )
    return MoEModelSpec(
        "tiny",
        router,
        1,
        3,
        2,
        1 if shared else 0,
        shared,
        gate,
        None,
        None,
        source="made for a test",
    )


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_layer_is_the_sum_of_its_experts_token_by_token(name: str) -> None:
    spec = preset(name).scaled(hidden=8, expert_hidden=4)
    torch.manual_seed(0)
    w, x_TD = _weights(spec, torch.float64), torch.randn(5, 8, dtype=torch.float64)
    got = torch_ops.layer(x_TD, w, spec)

    def swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        return w2 @ (F.silu(w1 @ x) * (w3 @ x))

    for t, x in enumerate(x_TD):
        want = torch.zeros(8, dtype=torch.float64)
        size = torch.zeros(8, dtype=torch.float64)
        for e, weight in zip(got.routing.experts_TK[t], got.routing.weights_TK[t], strict=True):
            term = weight * swiglu(x, *(m[e] for m in w.experts))
            want, size = want + term, size + term.abs()
        if w.shared is not None:
            term = swiglu(x, *w.shared)
            if w.shared_gate_D is not None:
                term = term * torch.sigmoid(w.shared_gate_D @ x)
            want, size = want + term, size + term.abs()
        # Summands of magnitude below 16 in three chained products of at most 16 terms, in float64 twice.
        slack = 2 * (8 + 8 + 16 + 16) * 2.0**-53 * (16 * size + 16)
        assert bool(((got.y_TD[t] - want).abs() <= slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_weight_of_every_preset_gets_a_finite_gradient(name: str, dtype: torch.dtype) -> None:
    spec = preset(name).scaled(hidden=16, expert_hidden=8)
    torch.manual_seed(0)
    w, x_TD = _weights(spec, dtype), torch.randn(32, 16).to(dtype).requires_grad_()
    out = torch_ops.layer(x_TD, w, spec)
    assert (out.y_TD.dtype, out.y_TD.shape) == (dtype, (32, 16))
    assert out.aux_loss.dtype == out.z_loss.dtype == torch.float32
    (out.y_TD.float().square().sum() + out.aux_loss + out.z_loss).backward()
    leaves = [x_TD, w.gate_ED, *w.experts, *(w.shared or ())]
    leaves += [] if w.shared_gate_D is None else [w.shared_gate_D]
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


@pytest.mark.parametrize("capacity", [None, 1])
@pytest.mark.parametrize(("shared", "gate", "sigmoid"), [(0, False, False), (2, False, True), (3, True, False)])
def test_the_gradient_of_the_layer_is_right(
    shared: int,
    gate: bool,
    sigmoid: bool,
    capacity: int | None,
) -> None:
    spec = _tiny(shared, gate=gate, sigmoid=sigmoid)
    torch.manual_seed(0)
    w = _weights(spec, torch.float64)
    x_TD = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [w.gate_ED, *w.experts, *(w.shared or ()), *(() if w.shared_gate_D is None else (w.shared_gate_D,))]

    def run(x_TD: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_ED, w1, w3, w2, *rest = leaves
        built = LayerWeights(
            gate_ED,
            w.bias_E,
            ExpertWeights(w1, w3, w2),
            SharedWeights(rest[0], rest[1], rest[2]) if shared else None,
            rest[3] if gate else None,
        )
        out = torch_ops.layer(x_TD, built, spec, capacity=capacity)
        return out.y_TD, out.aux_loss, out.z_loss

    assert torch.autograd.gradcheck(run, (x_TD, *leaves))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_token_that_is_not_finite_does_not_touch_the_others(name: str, value: float) -> None:
    spec = preset(name).scaled(hidden=16, expert_hidden=8)
    torch.manual_seed(0)
    w, x_TD = _weights(spec), torch.randn(6, 16)
    bad_TD = x_TD.clone()
    bad_TD[2, 3] = value
    free = torch_ops.layer(bad_TD, w, spec)
    assert free.y_TD[2].isnan().any()
    others = [0, 1, 3, 4, 5]
    assert free.y_TD[others].isfinite().all()
    # Replayed, so that the experts see the same numbers of rows: then not a bit of the other tokens changes.
    experts_TK = torch_ops.layer(x_TD, w, spec).routing.experts_TK
    clean = torch_ops.layer(x_TD, w, spec, experts_TK=experts_TK)
    bad = torch_ops.layer(bad_TD, w, spec, experts_TK=experts_TK)
    assert torch.equal(clean.y_TD[others], bad.y_TD[others])


@pytest.mark.parametrize("name", list(PRESETS))
def test_zero_tokens_go_through_forward_and_backward(name: str) -> None:
    spec = preset(name).scaled(hidden=16, expert_hidden=8)
    w, x_TD = _weights(spec), torch.zeros(0, 16, requires_grad=True)
    out = torch_ops.layer(x_TD, w, spec)
    assert out.y_TD.shape == (0, 16)
    assert out.aux_loss.item() == out.z_loss.item() == 0.0
    (out.y_TD.sum() + out.aux_loss + out.z_loss).backward()
    for leaf in (w.gate_ED, *w.experts, *(w.shared or ())):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_without_capacity_for_any_row_only_the_shared_experts_answer() -> None:
    spec = _tiny(2, gate=False, sigmoid=False)
    w, x_TD = _weights(spec), torch.randn(4, 3)
    got = torch_ops.layer(x_TD, w, spec, capacity=0).y_TD
    assert w.shared is not None
    assert torch.equal(got, F.linear(F.silu(F.linear(x_TD, w.shared[0])) * F.linear(x_TD, w.shared[1]), w.shared[2]))


def test_without_the_checks_the_results_are_the_same() -> None:
    spec = preset("deepseek-v3").scaled(hidden=16, expert_hidden=8)
    torch.manual_seed(0)
    w, x_TD = _weights(spec), torch.randn(6, 16)
    unchecked = TorchMoEOps(check_indices=False).layer(x_TD, w, spec)
    assert torch.equal(unchecked.y_TD, torch_ops.layer(x_TD, w, spec).y_TD)


def test_weights_that_contradict_the_spec_are_refused() -> None:
    plain, shared = _tiny(0, gate=False, sigmoid=False), _tiny(2, gate=True, sigmoid=False)
    w, x_TD = _weights(shared), torch.randn(4, 3)
    assert w.shared is not None
    w1, w3, w2 = w.shared
    for spec, weights in (
        (plain, w),
        (shared, w._replace(shared=None)),
        (shared, w._replace(shared_gate_D=None)),
        (shared, w._replace(shared=SharedWeights(w1, w3[:1], w2))),
        (shared, w._replace(shared=SharedWeights(w1, w3, w2[:, :1]))),
        (shared, w._replace(shared=SharedWeights(w1.double(), w3, w2))),
        (shared, w._replace(shared_gate_D=torch.zeros(2))),
    ):
        with pytest.raises(ShapeError, match="layer"):
            torch_ops.layer(x_TD, weights, spec)
