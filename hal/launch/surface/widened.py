# SPDX-License-Identifier: Apache-2.0
"""Kernels that CUDA has in 16 bits and a CPU in float32 alone: computed there, rounded, and counted as fallbacks.

They are found by trying: a kernel that torch has comes first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_IN_FLOAT32 = (
    "avg_pool3d", "avg_pool3d_backward", "_upsample_bilinear2d_aa", "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa", "_upsample_bicubic2d_aa_backward", "multi_margin_loss", "multi_margin_loss_backward",
    "multilabel_margin_loss_forward", "multilabel_margin_loss_backward",
)  # fmt: skip
"""What OpInfo's samples in float16 and bfloat16 find to be missing in torch 2.13."""

_PRODUCTS = ("mm.dtype", "bmm.dtype", "addmm.dtype", "baddbmm.dtype")
"""Products of 16 bits whose result is float32."""


def install(redirection: Redirection, patches: Patches) -> None:
    """Register kernels for a CPU; other devices' plug-ins bring their own way back to it."""
    import torch

    if redirection.hosts is None or not hasattr(torch.library, "get_kernel"):  # before torch 2.10
        return
    library = torch.library.Library("aten", "IMPL")
    patches.on_undo(library._destroy)
    for name in _IN_FLOAT32:
        _register(library, name, redirection)
    for name in _PRODUCTS:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if operator is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
            library.impl(operator, _product(packet, redirection), "CPU")


def _register(library: Any, name: str, redirection: Redirection) -> None:
    import torch

    operator: Any = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if operator is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
        return
    own = torch.library.get_kernel(operator, "CPU").call_boxed
    narrow = (torch.float16, torch.bfloat16)

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in narrow else value

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return own(keys, *args, **kwargs)
        except RuntimeError as error:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            dtypes = {value.dtype for value in given if value.dtype in narrow}
            if len(dtypes) != 1 or "not implemented for" not in str(error):
                raise
        (dtype,) = dtypes
        what = f"aten::{name}"
        redirection.fallback(what, f"of {dtype}, in float32", sum(value.nbytes for value in given))
        made = own(keys, *map(widened, args), **{key: widened(value) for key, value in kwargs.items()})
        return tuple(value.to(dtype) for value in made) if isinstance(made, tuple) else made.to(dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before; it is called, and comes back
        library.impl(operator, kernel, "CPU", with_keyset=True)


def _product(name: str, redirection: Redirection) -> Callable[..., Any]:
    import torch

    plain = getattr(torch, name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        *factors, out_dtype = args
        given = sum(factor.nbytes for factor in factors)
        redirection.fallback(f"torch.{name}", f"of {factors[-1].dtype}, in {out_dtype}", given)
        return plain(*(factor.to(out_dtype) for factor in factors), **kwargs)

    return kernel
