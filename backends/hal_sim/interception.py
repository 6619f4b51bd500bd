# SPDX-License-Identifier: Apache-2.0
"""torch's products of matrices, computed by a simulated unit for as long as a device is open.

Kernels in Python take the place of torch's own at the dispatcher's key of the CPU. So they are reached from every
thread, from `backward()` wherever it is called, and by whatever torch builds of these products: `linear`, `einsum`,
grouped products, `F.scaled_dot_product_attention` once its fused kernels are switched off. (A dispatch mode sees
neither other threads nor a `backward()` after its block.) Convolutions become products (convolution.py). What
multiplies inside one kernel of its own, and is reached only if a program asks for it by name, is computed as before,
and counted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hal.errors import ConfigError
from hal_sim import operators, scaled
from hal_sim.simulation import Simulation

_PRODUCTS: Mapping[str, Callable[..., torch.Tensor]] = {
    "mm": operators.mm, "bmm": operators.bmm, "addmm": operators.addmm, "baddbmm": operators.baddbmm,
    "addbmm": operators.addbmm, "addmv": operators.addmv, "mv": operators.mv,
    "_addmm_activation": operators.addmm_activation, "_scaled_mm": scaled.scaled_mm,
}  # fmt: skip
"""What has a form that puts its result into `out`; some also have one in place."""
_ALONE: Mapping[str, Callable[..., Any]] = {
    "_scaled_mm_v2": scaled.scaled_mm_v2, "_grouped_mm": operators.grouped_mm,
    "_scaled_grouped_mm": scaled.scaled_grouped_mm, "_scaled_grouped_mm_v2": scaled.scaled_grouped_mm_v2,
    "convolution": operators.convolution, "convolution_backward": operators.convolution_backward,
}  # fmt: skip

OWN_KERNELS = (
    "addr", "mkldnn_rnn_layer", "_transformer_encoder_layer_fwd", "_native_multi_head_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward", "conv_tbc",
    "_slow_conv2d_forward", "slow_conv3d_forward", "slow_conv_transpose2d", "slow_conv_transpose3d",
    "slow_conv_dilated2d", "slow_conv_dilated3d", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu",
    "_dyn_quant_matmul_4bit",
)  # fmt: skip
"""Operators that multiply inside a kernel of their own."""

_active: Simulation | None = None
_library: Any = None


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


def _registered() -> Any:
    """Put our kernels in the place of torch's own, which are kept for what no unit multiplies."""
    if not hasattr(torch.library, "get_kernel"):
        raise ConfigError(f"torch {torch.__version__} cannot simulate", expected="torch 2.10 or later")
    library = torch.library.Library("aten", "IMPL")
    for name, make in _PRODUCTS.items():
        packet = getattr(torch.ops.aten, name)
        _replace(library, packet.default, make)
        _replace(library, packet.out, functools.partial(operators.into, make))
        if hasattr(torch.ops.aten, f"{name}_"):
            _replace(library, getattr(torch.ops.aten, f"{name}_").default, functools.partial(operators.in_place, make))
    for name, make in _ALONE.items():
        if hasattr(torch.ops.aten, name):  # versions of torch differ
            _replace(library, getattr(torch.ops.aten, name).default, make)
    for name in OWN_KERNELS:
        if hasattr(torch.ops.aten, name):  # versions of torch differ
            _count(library, getattr(torch.ops.aten, name).default)
    return library


def _replace(library: Any, operator: Any, make: Callable[..., Any]) -> None:
    original = _own(operator)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is None or not all(operand.dtype.is_floating_point for operand in args[:2]):
            # Integers and complex numbers are for no unit that is simulated.
            return original(keys, *args, **kwargs)
        return make(_active, *args, **kwargs)

    _register(library, operator, kernel)


def _own(operator: Any) -> Callable[..., Any]:
    """Return torch's own kernel; where a CPU has none, what says so."""
    name = operator._schema.name

    def none(keys: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CPU' backend.")

    try:
        own: Callable[..., Any] = torch.library.get_kernel(operator, "CPU").call_boxed
    except RuntimeError:
        return none
    return own


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
