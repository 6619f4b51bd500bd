# SPDX-License-Identifier: Apache-2.0
"""The experts: SwiGLU on both paths, with empty experts, and with a backward pass of linear cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hal.errors import ShapeError
from hal.moe import ExpertWeights
from hal.moe.torch_ops import TorchMoEOps, torch_ops

loop, grouped = TorchMoEOps(grouped=False), TorchMoEOps(grouped=True)


def _weights(num_experts: int, width: int, hidden: int, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    shapes = ((num_experts, hidden, width), (num_experts, hidden, width), (num_experts, width, hidden))
    return ExpertWeights(*(torch.randn(s, dtype=dtype).div(s[-1] ** 0.5).requires_grad_() for s in shapes))


def _grouped_works(dtype: torch.dtype) -> bool:
    return torch_ops.experts_path(torch.zeros(1, 16, dtype=dtype), _weights(1, 16, 16, dtype)).value == "grouped"


def test_one_row_of_one_expert_is_worked_out_by_hand() -> None:
    w = ExpertWeights(*(torch.tensor([[[first]], [[1.0]]]) for first in (2.0, 3.0, 5.0)))
    # g = 2, u = 3, silu(2) = 2 / (1 + exp(-2)); y = 5 * 3 * silu(2)
    got = torch_ops.experts(torch.tensor([[1.0]]), torch.tensor([1, 0]), w).item()
    assert got == pytest.approx(30 / (1 + math.exp(-2)), rel=8 * 2.0**-24)  # fewer than 8 roundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_intermediate_is_stored_in_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, x_RD = _weights(2, 16, 16, dtype), torch.randn(3, 16).to(dtype)
    got = loop.experts(x_RD, torch.tensor([0, 3]), w)
    want = F.linear(F.silu(F.linear(x_RD, w.w1_EFD[1])) * F.linear(x_RD, w.w3_EFD[1]), w.w2_EDF[1])
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_the_gradient_of_the_experts_is_right_with_empty_ones_among_them() -> None:
    torch.manual_seed(0)
    w = _weights(4, 3, 2, torch.float64)
    x_RD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    counts_E = torch.tensor([0, 3, 0, 2])

    def run(x_RD: Tensor, *w: Tensor) -> Tensor:
        return torch_ops.experts(x_RD, counts_E, ExpertWeights(*w))

    assert torch.autograd.gradcheck(run, (x_RD, *w))


@pytest.mark.parametrize("ops", [loop, torch_ops])
@pytest.mark.parametrize("counts", [[0, 4, 0, 1], [5, 0, 0, 0], [0, 0, 0, 0]])
def test_an_expert_without_rows_gets_gradients_of_zero(ops: TorchMoEOps, counts: list[int]) -> None:
    torch.manual_seed(0)
    w, x_RD = _weights(4, 16, 16), torch.randn(sum(counts), 16)
    y_RD = ops.experts(x_RD, torch.tensor(counts), w)
    assert y_RD.shape == x_RD.shape
    y_RD.square().sum().backward()
    for weight in w:
        assert weight.grad is not None
        for count, grad in zip(counts, weight.grad, strict=True):
            assert bool(grad.any()) == (count > 0)


@pytest.mark.parametrize("ops", [loop, torch_ops])
def test_a_nan_stays_in_its_row_and_in_the_gradients_of_its_expert(ops: TorchMoEOps) -> None:
    torch.manual_seed(0)
    w, x_RD = _weights(3, 16, 16), torch.randn(6, 16)
    x_RD[2, 5] = math.nan
    y_RD = ops.experts(x_RD, torch.tensor([2, 2, 2]), w)
    assert y_RD[2].isnan().all()
    assert y_RD[[0, 1, 3, 4, 5]].isfinite().all()
    y_RD.sum().backward()
    assert w.w1_EFD.grad is not None
    assert w.w1_EFD.grad[1].isnan().any()
    assert w.w1_EFD.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("counts", [[7, 0, 9, 4], [0, 0, 20, 0]])
def test_the_grouped_path_agrees_with_the_loop_within_the_rounding_of_two_sums(counts: list[int]) -> None:
    if not _grouped_works(torch.float32):
        pytest.skip("this torch has no grouped product here")
    torch.manual_seed(0)
    width, hidden = 64, 32
    w, x_RD = _weights(4, width, hidden), torch.randn(sum(counts), width)
    counts_E = torch.tensor(counts)
    a, b = grouped.experts(x_RD, counts_E, w), loop.experts(x_RD, counts_E, w)
    u = 2.0**-24

    def gamma(n: int) -> float:
        return n * u / (1 - n * u)  # Higham 2002, lemma 3.1: any order of n additions

    expert_R = torch.repeat_interleave(torch.arange(4), counts_E)
    w1, w3, w2 = (m.detach().double()[expert_R] for m in w)
    x = x_RD.double()[:, :, None]
    g, v = (w1 @ x)[..., 0], (w3 @ x)[..., 0]
    # Each path's product is off by gamma(D) |w| |x|; the paths differ by at most twice that.
    dg, dv = (2 * gamma(width) * (m.abs() @ x.abs())[..., 0] for m in (w1, w3))
    h = F.silu(g) * v
    # |silu'| < 1.1; silu costs fewer than 8 roundings (exp, its argument, 1 +, division), the product one.
    dh = 1.1 * dg * (v.abs() + dv) + F.silu(g).abs() * dv + 2 * 9 * u * (h.abs() + 1.1 * dg * (v.abs() + dv))
    dy = (w2.abs() @ dh[..., None])[..., 0] + 2 * gamma(hidden) * (w2.abs() @ (h.abs() + dh)[..., None])[..., 0]
    assert bool(((a - b).double().abs() <= dy).all())
    upstream = torch.ones(()).expand_as(a)  # expanded: grouped_mm's own backward refuses it
    exact = torch.autograd.grad(a, tuple(w), upstream)
    assert all(bool(grad.isfinite().all()) for grad in exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_backward_of_the_grouped_path_is_exact_on_small_integers(dtype: torch.dtype) -> None:
    from hal.moe.experts import _grouped_linear

    if not _grouped_works(dtype):
        pytest.skip("this torch has no grouped product here")
    counts = [3, 0, 6, 0]
    x_RD = torch.arange(9 * 16).remainder(3).sub(1).view(9, 16).to(dtype).requires_grad_()
    w_END = torch.arange(4 * 8 * 16).remainder(5).sub(2).view(4, 8, 16).to(dtype).requires_grad_()
    y = _grouped_linear(x_RD, w_END, torch.tensor(counts).cumsum(0).int())
    want = torch.cat([F.linear(a, b) for a, b in zip(x_RD.split(counts), w_END.unbind(), strict=True)])
    assert torch.equal(y, want)
    got_grads = torch.autograd.grad(y.sum(), (x_RD, w_END))
    want_grads = torch.autograd.grad(want.sum(), (x_RD, w_END))
    assert all(torch.equal(a, b) for a, b in zip(got_grads, want_grads, strict=True))


def test_the_chosen_path_says_why() -> None:
    x = torch.zeros(1, 16)
    assert "asked for" in loop.experts_path(x, _weights(1, 16, 16)).because
    odd = torch_ops.experts_path(torch.zeros(1, 7), _weights(1, 7, 16))
    assert (odd.value, "D = 7" in odd.because) == ("loop", True)
    odd = torch_ops.experts_path(x, _weights(1, 16, 7))
    assert (odd.value, "F = 7" in odd.because) == ("loop", True)
    double = torch_ops.experts_path(x.double(), _weights(1, 16, 16, torch.float64))
    assert double.value == "loop"
    assert torch_ops.experts_path(x[:0], _weights(1, 16, 16)).because == "there are no rows"


def test_forcing_the_grouped_path_where_it_does_not_work_is_refused() -> None:
    with pytest.raises(ShapeError, match="no grouped product"):
        grouped.experts(torch.zeros(1, 7), torch.tensor([1]), _weights(1, 7, 16))


class _Written(TorchDispatchMode):
    """Counts the elements of everything that torch writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.elements += tensor.numel()
        return out


def test_the_backward_of_the_loop_writes_a_small_multiple_of_the_weights() -> None:
    num_experts = 64
    w = _weights(num_experts, 8, 8)
    y_RD = loop.experts(torch.randn(num_experts, 8), torch.ones(num_experts, dtype=torch.int64), w)
    total = sum(m.numel() for m in w)
    with _Written() as written:
        torch.autograd.grad(y_RD.sum(), tuple(w))
    # Each weight's gradient is written once per expert and once when they are stacked; the rows are less than
    # the weights. Indexing w[e] would write 64 gradients of the full size.
    assert total <= written.elements <= 4 * total
    x = torch.randn(num_experts, 8)
    wrong = sum((F.linear(x[e : e + 1], w.w1_EFD[e]) for e in range(num_experts)), start=torch.zeros(1, 8))
    with _Written() as written:
        torch.autograd.grad(wrong.sum(), w.w1_EFD)
    assert written.elements > num_experts * w.w1_EFD.numel()  # the measure sees the fault it is there for


def test_under_autocast_the_experts_compute_and_store_in_its_dtype() -> None:
    torch.manual_seed(0)
    w, x_RD = _weights(2, 16, 16), torch.randn(4, 16)
    counts_E = torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch_ops.experts(x_RD, counts_E, w)
    want = torch_ops.experts(x_RD.bfloat16(), counts_E, ExpertWeights(*(m.bfloat16() for m in w)))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.parametrize("ops", [loop, torch_ops])
def test_what_does_not_fit_is_refused(ops: TorchMoEOps) -> None:
    w, x_RD, counts_E = _weights(2, 16, 16), torch.zeros(3, 16), torch.tensor([1, 2])
    for call in (
        lambda: ops.experts(x_RD[0], counts_E, w),
        lambda: ops.experts(x_RD[:0], counts_E[:0], _weights(0, 16, 16)),
        lambda: ops.experts(torch.zeros(3, 8), counts_E, w),
        lambda: ops.experts(x_RD.bfloat16(), counts_E, w),
        lambda: ops.experts(x_RD, counts_E[:1], w),
        lambda: ops.experts(x_RD, counts_E.float(), w),
        lambda: ops.experts(x_RD, counts_E + 1, w),
        lambda: ops.experts(x_RD, torch.tensor([-1, 4]), w),
        lambda: ops.experts(x_RD, counts_E, w._replace(w3_EFD=torch.zeros(2, 8, 16))),
        lambda: ops.experts(x_RD, counts_E, w._replace(w2_EDF=torch.zeros(2, 16, 8))),
    ):
        with pytest.raises(ShapeError, match="experts"):
            call()


def test_the_grouped_path_takes_what_begins_anywhere_in_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    def product(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        assert (a.storage_offset(), b.storage_offset()) == (0, 0), "accelerators refuse it"
        return grouped_mm(a, b, offs=offs)

    grouped_mm = F.grouped_mm
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 8), (2, 16, 8), (2, 16, 8), (2, 8, 16), (5, 8)
    x, *weights, dy = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    found = []
    for lay in (torch.clone, shifted):
        leaves = [lay(tensor).requires_grad_() for tensor in (x, *weights)]
        y = grouped.experts(leaves[0], torch.tensor([2, 3]), ExpertWeights(*leaves[1:]))
        y.backward(lay(dy))
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
        monkeypatch.setattr(F, "grouped_mm", product)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_first_call_may_be_inside_a_checkpoint() -> None:
    from hal.moe import experts as module

    module._why_not_grouped.cache_clear()  # the trial of torch's grouped product saves tensors, which it counts
    x, w = torch.randn(8, 16, requires_grad=True), _weights(2, 16, 16)
    checkpoint(torch_ops.experts, x, torch.tensor([4, 4]), w, use_reentrant=False).sum().backward()
    assert x.grad is not None
