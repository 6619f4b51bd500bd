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
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hal import torch_kernels
from hal.errors import ConfigError
from hal.torch_kernels import Kernel, can_replace, replace_kernel
from hal_sim import attention, operators, scaled
from hal_sim.own_kernels import own_kernels
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
    "convolution_backward": operators.convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": attention.forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention.backward,
}  # fmt: skip

_WIDE: Mapping[str, Callable[..., torch.Tensor]] = {
    "mm": operators.mm, "bmm": operators.bmm, "addmm": operators.addmm, "baddbmm": operators.baddbmm,
}  # fmt: skip
"""What has a form whose result is wider than the operands (`out_dtype`), which torch has for CUDA alone."""

_OF_ONEDNN: Mapping[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "convolution": (torch.ops.aten.convolution.default, (0,)),
    "convolution_backward": (torch.ops.aten.convolution_backward.default, (1, 2, 2)),
    "mkldnn_linear": (torch.nn.functional.linear, (0,)),
}
"""What takes tensors in oneDNN's layout (`to_mkldnn`): the same of ordinary ones, and which operand each result is laid
out like. (torch's own convolution asks whether oneDNN is switched on, which it is not while a device is open.)"""

_active: Simulation | None = None
_libraries: dict[str, Any] = {}
"""By namespace: what holds the kernels that are in the place of torch's own, once a device was opened."""


def active() -> Simulation | None:
    """Return what multiplies at present."""
    return _active


def activate(simulation: Simulation | None) -> None:
    """Let a simulation compute all products from now on; None: torch does again.

    Our kernels stay where they are, and hand on to torch's: another thread may be in one of them, or on its way.
    """
    global _active
    if simulation is not None and not _libraries:
        try:
            _register_all()
        except BaseException:  # whoever opens the next device finds all kernels in place, or none
            for library in _libraries.values():
                library._destroy()
            _libraries.clear()
            raise
    _active = simulation
    torch_kernels.simulating = simulation is not None


def _register_all() -> None:
    """Put our kernels in the place of torch's own, which are kept for what no unit multiplies."""
    if not can_replace():
        raise ConfigError(f"torch {torch.__version__} cannot simulate", expected="torch 2.10 or later")
    for name, make in _PRODUCTS.items():
        packet = getattr(torch.ops.aten, name)
        _replace(packet.default, make)
        _replace(packet.out, functools.partial(operators.into, make))
        if hasattr(torch.ops.aten, f"{name}_"):
            _replace(getattr(torch.ops.aten, f"{name}_").default, functools.partial(operators.in_place, make))
    for name, make in _ALONE.items():
        if hasattr(torch.ops.aten, name):  # versions of torch differ
            _replace(getattr(torch.ops.aten, name).default, make)
    _replace(torch.ops.aten.convolution.default, operators.convolution, _check_convolution)
    for name, make in _WIDE.items():
        packet = getattr(torch.ops.aten, name)
        if "dtype" in packet.overloads():
            wide = functools.partial(operators.widened, make)
            _replace(packet.dtype, wide)
            _replace(packet.dtype_out, functools.partial(operators.into, wide))
    whole = torch.ops.aten.scaled_dot_product_attention.default
    for key in ("CPU", "AutogradCPU", "FuncTorchVmapMode"):  # the last decomposes it before the others see it
        _put(whole, key, lambda own: functools.partial(_attention, whole))
    for name, (ordinary, like) in _OF_ONEDNN.items():
        operator = getattr(torch.ops.aten, name).default
        _put(operator, "MkldnnCPU", functools.partial(_of_ordinary, ordinary, like))
    for operator, key in own_kernels():
        _put(operator, key, functools.partial(_counted, operator, key))


def _put(operator: Any, key: str, make: Callable[[Kernel], Kernel]) -> None:
    namespace = operator.namespace
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    replace_kernel(_libraries[namespace], operator, key, make)


def _name(operator: Any) -> str:
    name: str = operator._schema.name
    return name.removeprefix("aten::")


def _replace(operator: Any, make: Callable[..., Any], check: Callable[..., None] | None = None) -> None:
    """Let `make` compute what a unit multiplies, after a check that is given torch's own kernel and the operands."""

    def instead_of(own: Kernel) -> Kernel:
        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            simulation = _active  # another thread may close it
            if simulation is None:
                return own(keys, *args, **kwargs)
            dtypes = [operand.dtype for operand in args[:2]]
            if not all(dtype.is_floating_point for dtype in dtypes):
                # Integers and complex numbers are for no unit here; sums of integers are the same everywhere.
                if any(dtype.is_complex for dtype in dtypes):
                    return _by_the_cpu(simulation, f"{_name(operator)} of complex numbers", own, keys, *args, **kwargs)
                return own(keys, *args, **kwargs)
            if check is not None:
                check(functools.partial(own, keys), *args, **kwargs)
            return make(simulation, *args, **kwargs)

        return kernel

    _put(operator, "CPU", instead_of)


def _attention(whole: Any, keys: Any, *given: Any, **named: Any) -> torch.Tensor:
    return attention.chosen(_active, whole, *given, **named)


def _of_ordinary(ordinary: Callable[..., Any], like: tuple[int, ...], own: Kernel) -> Kernel:
    """Return a kernel for tensors in oneDNN's layout that asks for the same of ordinary ones."""

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is None:
            return own(keys, *args, **kwargs)
        given = [x.to_dense() if isinstance(x, torch.Tensor) and x.is_mkldnn else x for x in args]
        found = ordinary(*given, **kwargs)
        results = found if isinstance(found, tuple) else (found,)
        laid = [y if y is None or not args[i].is_mkldnn else y.to_mkldnn() for y, i in zip(results, like, strict=True)]
        return tuple(laid) if isinstance(found, tuple) else laid[0]

    return kernel


def _check_convolution(convolution: Kernel, x: torch.Tensor, *rest: Any, **kwargs: Any) -> None:
    """Let torch refuse what it refuses: of no image it computes nothing, and checks everything."""
    try:
        convolution(x[:0], *rest, **kwargs)
    except RuntimeError as error:
        raise type(error)(str(error).replace(str([0, *x.shape[1:]]), str(list(x.shape)))) from None


_inside = threading.local()
"""Whether this thread is in a kernel that is counted, which may call others."""


def _counted(operator: Any, key: str, own: Kernel) -> Kernel:
    name = f"{_name(operator)} of sparse matrices" if key.startswith("Sparse") else _name(operator)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        simulation = _active
        if simulation is None:
            return own(keys, *args, **kwargs)
        return _by_the_cpu(simulation, name, own, keys, *args, **kwargs)

    return kernel


def _by_the_cpu(simulation: Simulation, name: str, own: Kernel, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Let torch compute, and count it, but for what a kernel calls that is counted itself."""
    if getattr(_inside, "kernel", False):
        return own(keys, *args, **kwargs)
    simulation.count(name, args)
    _inside.kernel = True
    try:
        return own(keys, *args, **kwargs)
    finally:
        _inside.kernel = False
