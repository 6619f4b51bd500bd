# SPDX-License-Identifier: Apache-2.0
"""torch's operators on a simulated unit: shapes are checked, the product comes from the unit, the rest is here.

Accumulators start from zero. `alpha`, `beta` and a bias act in the accumulator's format afterwards, and the result is
rounded once: what cuBLAS's epilogue does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hal_sim import convolution as windows
from hal_sim.epilogue import finished
from hal_sim.grouped import check_layout
from hal_sim.simulation import Simulation


def into(
    make: Callable[..., torch.Tensor], simulation: Simulation, *given: Any, out: torch.Tensor, **named: Any
) -> torch.Tensor:
    """Put into `out` what one of the others returns.

    Raises:
        RuntimeError: it has another dtype.
    """
    result = make(simulation, *given, **named)
    if out.dtype != result.dtype:
        raise RuntimeError(f"Expected out tensor to have dtype {result.dtype}, but got {out.dtype} instead")
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def widened(make: Callable[..., torch.Tensor], simulation: Simulation, *given: Any, **named: Any) -> torch.Tensor:
    """Return what one of the others returns, rounded to the last argument, a dtype, and not to the operands'.

    Raises:
        RuntimeError: it is neither the operands' dtype nor, of 16 bits, float32.
    """
    *operands, dtype = given
    own = operands[-1].dtype
    if dtype != own and not (dtype == torch.float32 and own in (torch.float16, torch.bfloat16)):
        raise RuntimeError(f"out_dtype must be {own}, or float32 of 16-bit operands, and is {dtype}")
    return make(simulation, *operands, result=dtype, **named)


def in_place(
    make: Callable[..., torch.Tensor], simulation: Simulation, c: torch.Tensor, *given: Any, **named: Any
) -> torch.Tensor:
    """Put into the addend what one of the others returns.

    Raises:
        RuntimeError: the result has another shape.
    """
    result = make(simulation, c, *given, **named)
    if result.shape != c.shape:
        raise RuntimeError(f"an addend of shape {tuple(c.shape)} cannot hold a result of {tuple(result.shape)}")
    return c.copy_(result)


def _check_dtypes(what: str, *operands: torch.Tensor | None) -> None:
    """Refuse what a device of the kind refuses: products of several dtypes, and of 8-bit numbers without scales.

    Raises:
        RuntimeError: the operands' dtypes differ.
        NotImplementedError: they have 8 bits.
    """
    dtypes = [operand.dtype for operand in operands if operand is not None]
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise RuntimeError(f"{what}: operands must have the same dtype, but got {', '.join(map(str, dtypes))}")
    if dtypes[0].itemsize == 1:
        raise NotImplementedError(f"{what} is not implemented for {dtypes[0]}: torch multiplies it with scales alone")


def _two_matrices(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    _check_dtypes(what, a, b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise RuntimeError(f"{what}: mat1 and mat2 shapes cannot be multiplied ({tuple(a.shape)} and {tuple(b.shape)})")


def _batches(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    _check_dtypes(what, a, b)
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise RuntimeError(f"{what}: batches cannot be multiplied ({tuple(a.shape)} and {tuple(b.shape)})")


def _check_addend(what: str, c: torch.Tensor, a: torch.Tensor, result: torch.dtype | None) -> None:
    if result is None or c.dtype != result:
        _check_dtypes(what, c, a)


def _added(
    c: torch.Tensor, product: torch.Tensor, beta: complex, alpha: complex, result: torch.dtype | None
) -> torch.Tensor:
    return finished(product, c.expand_as(product), alpha, beta, result or c.dtype)


def mm(simulation: Simulation, a: torch.Tensor, b: torch.Tensor, *, result: torch.dtype | None = None) -> torch.Tensor:
    """Return a b, in the dtype of the operands or in another."""
    _two_matrices(a, b, "mm")
    return finished(simulation.product(a[None], b[None])[0], None, 1, 0, result or a.dtype)


def bmm(simulation: Simulation, a: torch.Tensor, b: torch.Tensor, *, result: torch.dtype | None = None) -> torch.Tensor:
    """Return the products of two batches, in the dtype of the operands or in another."""
    _batches(a, b, "bmm")
    return finished(simulation.product(a, b), None, 1, 0, result or a.dtype)


def addmm(
    simulation: Simulation, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: complex = 1, alpha: complex = 1,
    result: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return beta c + alpha a b; in another dtype than the operands' only if it is asked for, and is the addend's."""
    _two_matrices(a, b, "addmm")
    _check_addend("addmm", c, a, result)
    return _added(c, simulation.product(a[None], b[None])[0], beta, alpha, result)


def addmm_activation(
    simulation: Simulation,
    c: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: complex = 1,
    alpha: complex = 1,
    use_gelu: bool = False,
) -> torch.Tensor:
    """Return what `addmm` does, through a ReLU or GELU."""
    result = addmm(simulation, c, a, b, beta=beta, alpha=alpha)
    return torch.nn.functional.gelu(result, approximate="tanh") if use_gelu else torch.relu(result)


def baddbmm(
    simulation: Simulation, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: complex = 1, alpha: complex = 1,
    result: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return what `addmm` does for each matrix of batches."""
    _batches(a, b, "baddbmm")
    _check_addend("baddbmm", c, a, result)
    return _added(c, simulation.product(a, b), beta, alpha, result)


def addbmm(
    simulation: Simulation, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: complex = 1, alpha: complex = 1
) -> torch.Tensor:
    """Return beta c plus alpha times the sum of the batch's products: one product whose K is that of all."""
    _batches(a, b, "addbmm")
    wide, tall = a.transpose(0, 1).flatten(1), b.flatten(0, 1)
    return addmm(simulation, c, wide, tall, beta=beta, alpha=alpha)


def addmv(
    simulation: Simulation, c: torch.Tensor, a: torch.Tensor, v: torch.Tensor, *, beta: complex = 1, alpha: complex = 1
) -> torch.Tensor:
    """Return beta c + alpha a v."""
    _check_dtypes("addmv", c, a, v)
    if a.ndim != 2 or v.ndim != 1 or a.shape[1] != v.shape[0]:
        raise RuntimeError(f"addmv: {tuple(a.shape)} and {tuple(v.shape)} cannot be multiplied")
    return _added(c, simulation.product(a[None], v[None, :, None])[0, :, 0], beta, alpha, None)


def mv(simulation: Simulation, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return a v. (torch computes it without asking for `addmv` where the vector is contiguous.)"""
    return addmv(simulation, v.new_zeros(()), a, v, beta=0)


def grouped_mm(
    simulation: Simulation,
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the products of groups; see `hal_sim.grouped`."""
    _check_dtypes("grouped_mm", a, b)
    if bias is not None:
        raise RuntimeError("grouped_mm: a bias is not supported")
    if out_dtype not in (None, a.dtype):
        raise RuntimeError(f"grouped_mm: the result has the dtype of the operands, {a.dtype}, not {out_dtype}")
    check_layout(a, b)
    return simulation.grouped(a, b, offs).to(a.dtype).contiguous()


def convolution(
    simulation: Simulation, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """See `torch.ops.aten.convolution`; torch has checked the shapes."""
    _check_dtypes("convolution", x, weight, bias)
    stride, padding, dilation, output_padding = (
        _each(values, x.ndim - 2) for values in (stride, padding, dilation, output_padding)
    )
    product = simulation.product
    if transposed:
        window = weight.shape[2:]
        places = [(n - 1) * s - 2 * p + d * (w - 1) + o + 1 for n, s, p, d, w, o in zip(
            x.shape[2:], stride, padding, dilation, window, output_padding, strict=True)]  # fmt: skip
        size = (x.shape[0], weight.shape[1] * groups, *places)
        y = windows.gradient_of_input(product, x, size, weight, stride, padding, dilation, groups)
    else:
        y = windows.convolved(product, x, weight, stride, padding, dilation, groups)
    addend = None if bias is None else bias.view(1, -1, *[1] * (x.ndim - 2)).expand_as(y)
    return finished(y, addend, 1, 1, x.dtype).contiguous(memory_format=_memory_format(x, weight))


def convolution_backward(
    simulation: Simulation, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: list[int] | None,
    stride: list[int], padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
    groups: int, output_mask: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """See `torch.ops.aten.convolution_backward`."""
    _check_dtypes("convolution_backward", dy, x, weight)
    stride, padding, dilation = (_each(values, x.ndim - 2) for values in (stride, padding, dilation))
    product, rest = simulation.product, (stride, padding, dilation, groups)
    dx = dweight = dbias = None
    if output_mask[0]:
        dx = (windows.convolved(product, dy, weight, *rest) if transposed else
              windows.gradient_of_input(product, dy, x.shape, weight, *rest)).to(x.dtype)  # fmt: skip
    if output_mask[1]:
        inner, outer = (x, dy) if transposed else (dy, x)
        dweight = windows.gradient_of_weight(product, inner, outer, weight.shape, *rest).to(weight.dtype)
    if output_mask[2]:
        dbias = dy.sum([0, *range(2, dy.ndim)])
    return dx, dweight, dbias


def _memory_format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Return how a convolution's result lies in memory: channels last if that is how one of its operands lies."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None:
        return torch.contiguous_format
    apart = any(y.is_contiguous(memory_format=last) and not y.is_contiguous() for y in (x, weight))
    return last if apart else torch.contiguous_format


def _each(values: list[int], axes: int) -> list[int]:
    return list(values) * axes if len(values) == 1 else list(values)
