# SPDX-License-Identifier: Apache-2.0
"""The experts: SwiGLU, by one grouped matrix product where the device has a correct one, else expert by
expert.

Legend: R routed rows, sorted by expert; D model dim, F expert hidden dim, E routed experts, S shared width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hal.errors import ShapeError
from hal.moe.checks import as_index, check_floating, check_same_device, check_same_dtype, check_shape
from hal.moe.ops import ExpertWeights
from hal.moe.precision import model_dtype, without_autocast

# torch's grouped kernels load 16 bytes at a time and refuse rows that do not start on such a boundary.
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class ExpertsPath:
    """How the experts are computed, and why."""

    value: Literal["grouped", "loop"]
    because: str


def experts(
    x_RD: Tensor,
    counts_E: Tensor,
    weights: ExpertWeights,
    *,
    grouped: bool | None = None,
    check_indices: bool = True,
) -> Tensor:
    """Return w2 (silu(w1 x) * (w3 x)) of each row's expert; see `MoEOps.experts`.

    Under autocast, rows and weights are first cast to its dtype, which is then the dtype of the result. An
    expert without rows gets zero gradients; zero rows give [0, D]. A NaN row makes its own result NaN, and in
    the backward pass the weight gradients of its own expert.

    Args:
        x_RD: the rows.
        counts_E: rows of each expert. The loop reads them back, so the host waits for the device once; the
            grouped product needs no wait but for the check.
        weights: of the dtype of `x_RD`.
        grouped: True or False forces a path; None takes the grouped one where it works.
        check_indices: whether the counts are checked against R where that costs a wait.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, E is 0, the counts do not add up to R, or the grouped path was
            forced where it does not work.
    """
    counts_E = _check(x_RD, counts_E, weights)
    dtype = model_dtype(x_RD)
    path = experts_path(x_RD, weights, grouped=grouped)
    if grouped and path.value == "loop":
        raise ShapeError(f"experts: no grouped product: {path.because}", hint="grouped=None")
    with without_autocast(x_RD):
        x_RD = x_RD.to(dtype)
        weights = ExpertWeights(*(w.to(dtype) for w in weights))
        if path.value == "grouped":
            if check_indices:
                _check_counts(counts_E.tolist(), x_RD.shape[0])
            return _grouped(x_RD, counts_E, weights)
        counts = counts_E.tolist()
        _check_counts(counts, x_RD.shape[0])
        return _loop(x_RD, counts, weights)


def swiglu(x_TD: Tensor, w1_SD: Tensor, w3_SD: Tensor, w2_DS: Tensor) -> Tensor:
    """Return w2 (silu(w1 x) * (w3 x)); each of the three products and their factors stored in the dtype of x.

    Source: Shazeer 2020, eq. 6 (arXiv:2002.05202).
    """
    return F.linear(F.silu(F.linear(x_TD, w1_SD)) * F.linear(x_TD, w3_SD), w2_DS)


def experts_path(x_RD: Tensor, weights: ExpertWeights, *, grouped: bool | None = None) -> ExpertsPath:
    """Say which path `experts` takes for these arguments, and why. The first call for a device and dtype
    tries it."""
    if grouped is False:
        return ExpertsPath("loop", "grouped=False was asked for")
    dtype = model_dtype(x_RD)
    if x_RD.shape[0] == 0:
        return ExpertsPath("loop", "there are no rows")
    for name, width in (("D", weights.w1_EFD.shape[2]), ("F", weights.w1_EFD.shape[1])):
        if width == 0 or width * dtype.itemsize % _ALIGNMENT_BYTES:
            because = f"{name} = {width} in {dtype} is no multiple of {_ALIGNMENT_BYTES} bytes"
            return ExpertsPath("loop", because)
    reason = _why_not_grouped(str(x_RD.device), dtype)
    if reason is not None:
        return ExpertsPath("loop", reason)
    return ExpertsPath("grouped", f"torch's grouped product works on {x_RD.device} in {dtype} (tried)")


def _check(x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Return the counts in int64."""
    where = "experts"
    check_shape(where, "x_RD", x_RD, ("R", "D"))
    check_floating(where, "x_RD", x_RD)
    w1_EFD, w3_EFD, w2_EDF = weights
    check_shape(where, "w1_EFD", w1_EFD, ("E", "F", x_RD.shape[1]))
    num_experts, hidden, width = w1_EFD.shape
    if num_experts == 0:
        raise ShapeError(f"{where}: w1_EFD has no expert", expected="E of at least 1")
    check_shape(where, "w3_EFD", w3_EFD, (num_experts, hidden, width))
    check_shape(where, "w2_EDF", w2_EDF, (num_experts, width, hidden))
    for name, w in zip(("w1_EFD", "w3_EFD", "w2_EDF"), weights, strict=True):
        check_same_dtype(where, "x_RD", x_RD, name, w)
    check_shape(where, "counts_E", counts_E, (num_experts,))
    check_same_device(where, x_RD=x_RD, counts_E=counts_E, w1_EFD=w1_EFD, w3_EFD=w3_EFD, w2_EDF=w2_EDF)
    return as_index(where, "counts_E", counts_E)


def _check_counts(counts: list[int], num_rows: int) -> None:
    if min(counts, default=0) < 0 or sum(counts) != num_rows:
        raise ShapeError(
            f"experts: counts_E adds up to {sum(counts)}, its least is {min(counts, default=0)}",
            expected=f"R = {num_rows} and no negative count",
        )


def _loop(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    # `unbind` and `split`, never `w[e]`: the backward of E separate indexings fills E tensors of the full
    # size.
    per_expert = zip(x_RD.split_with_sizes(counts), *(w.unbind() for w in weights), strict=True)
    # An empty expert is skipped, and unbind's backward gives it zeros. Without any row the first one is kept,
    # so that the result still depends on the weights.
    kept = [parts for e, parts in enumerate(per_expert) if counts[e] or (e == 0 and x_RD.shape[0] == 0)]
    return torch.cat([swiglu(x, w1, w3, w2) for x, w1, w3, w2 in kept])


def _grouped(x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    ends_E = counts_E.cumsum(0).to(torch.int32)
    x_RD = _aligned(x_RD)
    g_RF = _grouped_linear(x_RD, weights.w1_EFD, ends_E)
    u_RF = _grouped_linear(x_RD, weights.w3_EFD, ends_E)
    return _grouped_linear(F.silu(g_RF) * u_RF, weights.w2_EDF, ends_E)


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor as accelerators' grouped products want it: dense, and beginning at a multiple of 16 bytes.

    A part of a flat buffer need not (torch 2.13: "expected data_ptr to be aligned to 16 bytes"). Asked by the offset,
    not the address, which a compiler does not know: storages begin at multiples of 64 bytes and more.
    """
    dense = tensor.contiguous()
    offset = dense.storage_offset() * dense.element_size()
    return dense.clone() if offset % _ALIGNMENT_BYTES else dense


def _grouped_linear(x_RD: Tensor, w_END: Tensor, ends_E: Tensor) -> Tensor:
    product = F.grouped_mm(x_RD, _aligned(w_END).transpose(-2, -1), offs=ends_E)
    y: Tensor = _ContiguousGradient.apply(product)  # type: ignore[no-untyped-call]
    return y


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is dense and aligned.

    The backward of grouped_mm refuses expanded gradients, such as that of `y.sum()` (torch 2.13: "Invalid
    strides/sizes"); drop when it copies them itself.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _aligned(grad)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@lru_cache(maxsize=64)
def _why_not_grouped(device: str, dtype: torch.dtype) -> str | None:
    """Try the grouped product, forward and backward, on small integers with empty groups; None if all is
    exact.

    Tried rather than looked up: which dtypes and devices have it changes with every release of torch.
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    counts = [3, 0, 5, 0]
    try:
        # Hooks in force are not for this: a checkpoint counts what is saved, and would miss it in the second call.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            values = torch.arange(8 * 16, device=device).remainder(5).sub(2)
            x = values.view(8, 16).to(dtype).requires_grad_()
            w = torch.arange(4 * 8 * 16, device=device).remainder(7).sub(3).view(4, 8, 16).to(dtype)
            w.requires_grad_()
            ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
            grad = values[: 8 * 8].view(8, 8).to(dtype)
            got = _grouped_linear(x, w, ends)
            got_grads = torch.autograd.grad(got, (x, w), grad)
            parts = zip(x.split_with_sizes(counts), w.unbind(), strict=True)
            want = torch.cat([F.linear(a, b) for a, b in parts])
            want_grads = torch.autograd.grad(want, (x, w), grad)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"torch's grouped product does not work on {device} in {dtype}: {str(error).splitlines()[0]}"
    # Exact: every sum is an integer of at most 16 * 2 * 3 = 96 in magnitude, held by each of these dtypes.
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        if not torch.equal(a, b):
            return f"torch's grouped product is wrong on {device} in {dtype} (small integers, empty groups)"
    return None
