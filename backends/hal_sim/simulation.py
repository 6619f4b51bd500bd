# SPDX-License-Identifier: Apache-2.0
"""torch's products of matrices, computed by a simulated unit for as long as a device is open.

Kernels in Python take the place of torch's own at the dispatcher's key of the CPU. So they are reached from every
thread, from `backward()` wherever it is called, and by whatever torch builds of these products: `linear`, `einsum`,
grouped products, `F.scaled_dot_product_attention` once its fused kernels are switched off. (A dispatch mode sees
neither other threads nor a `backward()` after its block.) Convolutions become products (convolution.py). What
multiplies inside one kernel of its own, and is reached only if a program asks for it by name, is computed as before,
and counted.

Accumulators start from zero. `alpha`, `beta` and a bias act in float32 afterwards, and the result is rounded once: what
cuBLAS's epilogue does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hal.errors import ConfigError, UnsupportedOperation
from hal_sim import convolution
from hal_sim.chips import Chip
from hal_sim.product import multiply
from hal_sim.schedule import Schedule

OWN_KERNELS = ("addr", "mkldnn_rnn_layer", "_transformer_encoder_layer_fwd", "_native_multi_head_attention")
"""Operators that multiply inside a kernel of their own."""


@dataclass
class Simulation:
    """One device's way to multiply.

    Attributes:
        device_id: for messages.
        chip: whose unit.
        schedule: how K is shared out.
        strict: whether what is not simulated is refused.
        tf32: whether float32 operands go to the TF32 unit.
        not_simulated: operators that were computed as a CPU does, and how often.
    """

    device_id: str
    chip: Chip
    schedule: Schedule
    strict: bool = False
    tf32: bool = False
    not_simulated: Counter[str] = field(default_factory=Counter)

    def product(self, a_BMK: torch.Tensor, b_BKN: torch.Tensor) -> torch.Tensor:
        """Return a b in the accumulator's format.

        Raises:
            UnsupportedOperation: the chip has no unit for the dtype.
        """
        formats = self._format(a_BMK.dtype), self._format(b_BKN.dtype)
        return multiply(a_BMK, b_BKN, self.chip.units[formats[0]], formats, self.schedule)

    def _format(self, dtype: torch.dtype) -> str:
        name = str(dtype).removeprefix("torch.")
        if name == "float32" and self.tf32 and "tf32" in self.chip.units:
            return "tf32"
        if name not in self.chip.units:
            has = ", ".join(sorted(unit for unit in self.chip.units if unit != "tf32"))
            raise UnsupportedOperation(
                f"{self.chip.product} has no matrix unit for {name}", device=self.device_id, what=name, expected=has
            )
        return name

    def count(self, operator: str) -> None:
        """Take note of an operator that is not simulated.

        Raises:
            UnsupportedOperation: the device is strict.
        """
        if self.strict:
            raise UnsupportedOperation(
                f"{operator} multiplies inside a kernel of its own, which is not simulated", device=self.device_id,
                what=operator, hint=f"open {self.device_id.replace('/strict', '')} to compute it as a CPU does",
            )  # fmt: skip
        self.not_simulated[operator] += 1


_active: Simulation | None = None


def active() -> Simulation | None:
    """Return what multiplies at present."""
    return _active


def activate(simulation: Simulation | None) -> None:
    """Let a simulation compute all products from now on; None: torch does again."""
    global _active, _library
    if simulation is not None and _library is None:
        _library = _registered()
    _active = simulation
    if simulation is None and _library is not None:
        _library._destroy()
        _library = None


_library: Any = None


def _registered() -> Any:
    """Put our kernels in the place of torch's own, which are kept for what no unit multiplies."""
    if not hasattr(torch.library, "get_kernel"):
        raise ConfigError(f"torch {torch.__version__} cannot simulate", expected="torch 2.10 or later")
    library = torch.library.Library("aten", "IMPL")
    for name, make in (
        ("mm", _mm), ("bmm", _bmm), ("addmm", _addmm), ("baddbmm", _baddbmm), ("addbmm", _addbmm), ("addmv", _addmv),
        ("_addmm_activation", _addmm_activation),
    ):  # fmt: skip
        packet = getattr(torch.ops.aten, name)
        _replace(library, packet.default, make)
        _replace(library, packet.out, lambda *given, out, make=make, **named: _copied(out, make(*given, **named)))
    _replace(library, torch.ops.aten._scaled_mm.default, _scaled_mm)
    _replace(library, torch.ops.aten.convolution.default, _convolution)
    _replace(library, torch.ops.aten.convolution_backward.default, _convolution_backward)
    for name in OWN_KERNELS:
        _count(library, getattr(torch.ops.aten, name).default)
    return library


def _replace(library: Any, operator: Any, make: Callable[..., Any]) -> None:
    original = torch.library.get_kernel(operator, "CPU").call_boxed

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if _active is None or not all(tensor.dtype.is_floating_point for tensor in tensors):
            # Integers and complex numbers are for no unit that is simulated.
            return original(keys, *args, **kwargs)
        return make(*args, **kwargs)

    _register(library, operator, kernel)


def _count(library: Any, operator: Any) -> None:
    original = torch.library.get_kernel(operator, "CPU").call_boxed
    name = operator._schema.name.removeprefix("aten::")

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is not None:
            _active.count(name)
        return original(keys, *args, **kwargs)

    _register(library, operator, kernel)


def _register(library: Any, operator: Any, kernel: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before, which comes back
        library.impl(operator, kernel, "CPU", with_keyset=True)


# The operators -------------------------------------------------------------------------------------------------------


def _simulation() -> Simulation:
    assert _active is not None
    return _active


def _finished(
    product: torch.Tensor, addend: torch.Tensor | None, alpha: float, beta: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return alpha product + beta addend in the accumulator's format, rounded once to `dtype`."""
    if alpha != 1:
        product = product * alpha
    if addend is not None and beta != 0:  # then not even a NaN of it counts
        wide = addend.to(product.dtype)
        product = product + (wide if beta == 1 else wide * beta)
    return product.to(dtype)


def _copied(out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _two_matrices(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise RuntimeError(
            f"{what}: mat1 and mat2 shapes cannot be multiplied, or dtypes differ "
            f"({tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype})"
        )


def _batches(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or a.dtype != b.dtype:
        raise RuntimeError(
            f"{what}: batches cannot be multiplied, or dtypes differ "
            f"({tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype})"
        )


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    _two_matrices(a, b, "mm")
    return _finished(_simulation().product(a[None], b[None])[0], None, 1, 0, a.dtype)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    _batches(a, b, "bmm")
    return _finished(_simulation().product(a, b), None, 1, 0, a.dtype)


def _addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    _two_matrices(a, b, "addmm")
    product = _simulation().product(a[None], b[None])[0]
    return _finished(product, c.expand_as(product), alpha, beta, c.dtype)


def _addmm_activation(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> torch.Tensor:
    result = _addmm(c, a, b, beta=beta, alpha=alpha)
    return torch.nn.functional.gelu(result, approximate="tanh") if use_gelu else torch.relu(result)


def _baddbmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    _batches(a, b, "baddbmm")
    product = _simulation().product(a, b)
    return _finished(product, c.expand_as(product), alpha, beta, c.dtype)


def _addbmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    # One product whose K is that of all matrices.
    _batches(a, b, "addbmm")
    wide, tall = a.transpose(0, 1).flatten(1), b.flatten(0, 1)
    return _addmm(c, wide, tall, beta=beta, alpha=alpha)


def _addmv(c: torch.Tensor, a: torch.Tensor, v: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if a.ndim != 2 or v.ndim != 1 or a.shape[1] != v.shape[0] or a.dtype != v.dtype:
        raise RuntimeError(f"addmv: {tuple(a.shape)} {a.dtype} and {tuple(v.shape)} {v.dtype} cannot be multiplied")
    product = _simulation().product(a[None], v[None, :, None])[0, :, 0]
    return _finished(product, c.expand_as(product), alpha, beta, c.dtype)


def _scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None, out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise RuntimeError(f"scaled_mm: {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    product = _simulation().product(a[None], b[None])[0]
    for scale in (scale_a, scale_b):  # of the whole, of each row, or of each column
        if scale.numel() != 1 and scale.shape not in ((a.shape[0], 1), (1, b.shape[1])):
            raise UnsupportedOperation(
                f"scales of shape {tuple(scale.shape)} are not simulated", device=_simulation().device_id,
                what="scaled_mm", expected="one number, or one for each row or column",
            )  # fmt: skip
    product = product * scale_a * scale_b
    result = _finished(product, None if bias is None else bias.expand_as(product), 1, 1, out_dtype or a.dtype)
    return result if scale_result is None else (result.float() * scale_result).to(result.dtype)


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    stride, padding, dilation, output_padding = (
        _each(values, x.ndim - 2) for values in (stride, padding, dilation, output_padding)
    )
    product = _simulation().product
    if transposed:
        window = weight.shape[2:]
        places = [(n - 1) * s - 2 * p + d * (w - 1) + o + 1 for n, s, p, d, w, o in zip(
            x.shape[2:], stride, padding, dilation, window, output_padding, strict=True)]  # fmt: skip
        size = (x.shape[0], weight.shape[1] * groups, *places)
        y = convolution.gradient_of_input(product, x, size, weight, stride, padding, dilation, groups)
    else:
        y = convolution.convolved(product, x, weight, stride, padding, dilation, groups)
    addend = None if bias is None else bias.view(1, -1, *[1] * (x.ndim - 2)).expand_as(y)
    return _finished(y, addend, 1, 1, x.dtype).contiguous()


def _convolution_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: list[int] | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
    output_mask: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    stride, padding, dilation = (_each(values, x.ndim - 2) for values in (stride, padding, dilation))
    product, rest = _simulation().product, (stride, padding, dilation, groups)
    dx = dweight = dbias = None
    if output_mask[0]:
        dx = (convolution.convolved(product, dy, weight, *rest) if transposed else
              convolution.gradient_of_input(product, dy, x.shape, weight, *rest)).to(x.dtype)  # fmt: skip
    if output_mask[1]:
        inner, outer = (x, dy) if transposed else (dy, x)
        dweight = convolution.gradient_of_weight(product, inner, outer, weight.shape, *rest).to(weight.dtype)
    if output_mask[2]:
        dbias = dy.sum([0, *range(2, dy.ndim)])
    return dx, dweight, dbias


def _each(values: list[int], axes: int) -> list[int]:
    return list(values) * axes if len(values) == 1 else list(values)
