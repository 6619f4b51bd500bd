# SPDX-License-Identifier: Apache-2.0
"""torch's attention: which kernels a program admits, and what of FlexAttention a CPU lacks.

A program that leaves out the plain form admits only kernels of CUDA's. A CPU has one of its own that goes by the name
of flash attention and takes fewer calls, and none by the other names: there the plain form is admitted as well, which
is a change of meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hal.launch.api import active, api
from hal.launch.redirection import Redirection
from hal.launch.surface.compiler import traced

_NOTE = "on a CPU the plain form is admitted, too"


@api("torch.nn.attention.sdpa_kernel", note=_NOTE)
def sdpa_kernel(r: Redirection, backends: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit kernels inside a block."""
    from torch.nn.attention import SDPBackend
    from torch.nn.attention import sdpa_kernel as own

    asked = [backends] if isinstance(backends, SDPBackend) else backends
    if isinstance(asked, list) and SDPBackend.MATH not in asked and r.hosts is not None:
        _another(r, "torch.nn.attention.sdpa_kernel", (backend.name for backend in asked))
        asked = [*asked, SDPBackend.MATH]
    return own(asked, *args, **kwargs)


@api("torch.backends.cuda.sdp_kernel", note=_NOTE)
def sdp_kernel(r: Redirection, enable_flash: bool = True, enable_math: bool = True, enable_mem_efficient: bool = True,
               enable_cudnn: bool = True) -> Any:  # fmt: skip
    """The old name."""
    import torch

    if not enable_math and r.hosts is not None:
        names = {"flash": enable_flash, "mem_efficient": enable_mem_efficient, "cudnn": enable_cudnn}
        _another(r, "torch.backends.cuda.sdp_kernel", (name for name, enabled in names.items() if enabled))
        enable_math = True
    return torch.backends.cuda.sdp_kernel(enable_flash, enable_math, enable_mem_efficient, enable_cudnn)


@api("torch.backends.cuda.enable_math_sdp", note=_NOTE)
def enable_math_sdp(r: Redirection, enabled: bool) -> None:
    """Admit the plain form from here on, or not."""
    import torch

    if not enabled and r.hosts is not None:
        _another(r, "torch.backends.cuda.enable_math_sdp", ())
        enabled = True
    torch.backends.cuda.enable_math_sdp(enabled)


def _another(r: Redirection, name: str, kernels: Iterable[str]) -> None:
    import torch

    asked = " and ".join(kernels) or "a kernel of CUDA's"
    what = f"{asked} alone was asked for; the CPU's own kernel computes, or the plain form"
    if torch.compiler.is_dynamo_compiling():
        traced.note("change", name, what)
    else:
        r.change(name, what)


@api("torch.nn.attention.flex_attention.flex_attention", note="on a CPU, gradients in the plain form")
def flex_attention(r: Redirection, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Gradients are torch's plain form's where the device is a CPU, for which torch has no kernel with a backward."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention as own

    if r.hosts is not None and any(tensor.requires_grad for tensor in (query, key, value)):
        if torch.is_grad_enabled():
            return _trained(query, key, value, *args, **kwargs)
        # torch asks for no gradient here, and refuses all the same.
        query, key, value = query.detach(), key.detach(), value.detach()
    return own(query, key, value, *args, **kwargs)


def _trained(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the plain form, outside of what is compiled: its backward pass is none that the compiler has for a CPU."""
    import torch

    return torch.compiler.disable(_plain)(query, key, value, *args, **kwargs)


def _plain(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.nn.attention import flex_attention as home

    if (r := active()) is not None:
        nbytes = sum(tensor.nbytes for tensor in (query, key, value))
        r.fallback(f"{home.__name__}.flex_attention", "with gradients in the plain form", nbytes)
    # All that this checks is the device, and that a CPU is not asked for gradients.
    check, home._validate_device = home._validate_device, lambda *tensors: None
    try:
        return home.flex_attention(query, key, value, *args, **kwargs)
    finally:
        home._validate_device = check
