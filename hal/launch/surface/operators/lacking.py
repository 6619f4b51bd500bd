# SPDX-License-Identifier: Apache-2.0
"""Operators that CUDA has and a device lacks: they run another way, counted, with the bytes that went through.

A program that believes in CUDA chooses them: transformers counts the tokens of its experts with `torch.histc` of
integers, which torch has on CUDA and not on a CPU. Other devices' plug-ins bring their own way back to the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import api
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.surface.compiler import traced

if TYPE_CHECKING:
    import torch


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the methods of tensors; the functions stand in the table."""
    import torch

    original = torch.Tensor.histc

    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        r = state.active()
        return original(self, *args, **kwargs) if r is None else _histc(r, original, self, *args, **kwargs)

    patches.set(torch.Tensor, "histc", method)


@api("torch.histc", note="integers are counted in float64, exactly, where the device counts no integers")
def histc(r: Redirection, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Count integers, too."""
    import torch

    return _histc(r, torch.histc, input, *args, **kwargs)


def _histc(
    r: Redirection, original: Callable[..., torch.Tensor], input: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    import torch

    if input.is_floating_point() or r.hosts is None:
        return original(input, *args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        traced.note("fallback", "torch.histc", "of integers, in float64")
    else:
        r.fallback("torch.histc", f"of {input.dtype}, in float64", input.numel() * input.element_size())
    # A float64 holds every count and every bin's edge that an integer tensor of this size can have.
    return original(input.double(), *args, **kwargs).to(input.dtype)


@api("torch.linalg.svd", note="`driver` names a routine of cuSOLVER's, and the device's own computes")
def svd(r: Redirection, *args: Any, driver: str | None = None, **kwargs: Any) -> Any:
    """Decompose, whatever routine of NVIDIA's is asked for."""
    import torch

    _ignore_driver(r, "torch.linalg.svd", driver)
    return torch.linalg.svd(*args, **kwargs)


@api("torch.linalg.svdvals", note="as `svd`")
def svdvals(r: Redirection, *args: Any, driver: str | None = None, **kwargs: Any) -> Any:
    """Return the singular values alone."""
    import torch

    _ignore_driver(r, "torch.linalg.svdvals", driver)
    return torch.linalg.svdvals(*args, **kwargs)


def _ignore_driver(r: Redirection, name: str, driver: str | None) -> None:
    import torch

    what = f"{driver!r} of cuSOLVER's was asked for; the device's own routine computes"
    if driver is not None and torch.compiler.is_dynamo_compiling():
        traced.note("change", name, what)
    elif driver is not None:
        r.change(name, what)
