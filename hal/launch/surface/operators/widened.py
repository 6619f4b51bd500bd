# SPDX-License-Identifier: Apache-2.0
"""Kernels that CUDA has in 8 or 16 bits and a CPU in float32 alone: computed there, rounded, and counted as fallbacks.

They are found by trying: a kernel that torch has comes first.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.torch_kernels import Kernel, add_kernel, can_replace, find_operator, has_kernel, register, replace_kernel

if TYPE_CHECKING:
    import torch

_IN_FLOAT32 = (
    "avg_pool3d", "avg_pool3d_backward", "_upsample_bilinear2d_aa", "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa", "_upsample_bicubic2d_aa_backward", "multi_margin_loss", "multi_margin_loss_backward",
    "multilabel_margin_loss_forward", "multilabel_margin_loss_backward",
)  # fmt: skip
"""What OpInfo's samples in float16 and bfloat16 find to be missing in torch 2.13."""

_PRODUCTS = tuple(f"{name}.{form}" for name in ("mm", "bmm", "addmm", "baddbmm") for form in ("dtype", "dtype_out"))
"""Products of 16 bits whose result is float32."""

TRANSFORMS = (
    *(f"fft_{inverse}{kind}fft{axes}" for kind in ("", "r", "h") for inverse in ("", "i") for axes in ("", "2", "n")),
    "stft",
    "stft.center",
    "istft",
)
"""Fourier transforms: of float16, whose result is complex32, which a CPU's libraries do not have."""


def install(redirection: Redirection, patches: Patches) -> None:
    """Register kernels for a CPU; other devices' plug-ins bring their own way back to it."""
    import torch

    if redirection.hosts is None:
        return
    library = torch.library.Library("aten", "IMPL")
    patches.on_undo(library._destroy)
    for name in _IN_FLOAT32:
        operator = find_operator(name)
        if operator is not None and has_kernel(operator, "CPU") and can_replace():
            replace_kernel(library, operator, "CPU", functools.partial(_widened, name, redirection))
    for name in _PRODUCTS:
        add_kernel(library, name, "CPU", _product(name.partition(".")[0], redirection))
    for name in ("_scaled_grouped_mm", "_scaled_grouped_mm_v2"):
        add_kernel(library, name, "CPU", _grouped(name, redirection))
    when_loaded("torch._inductor.lowering", "lowerings", functools.partial(_left_as_calls, patches))
    for name in TRANSFORMS:
        transform, into = find_operator(name), find_operator(f"{name}.out")
        if transform is None:
            continue
        kernel = _transform(transform, redirection)
        for key in ("CPU", "AutogradCPU", "FuncTorchBatched"):
            register(library, transform, key, kernel)
        if into is not None:
            register(library, into, "CPU", functools.partial(_into, into, kernel))


def _left_as_calls(patches: Patches, lowerings: dict[Any, Any]) -> None:
    """Let the compiler of kernels call products with a wide result, which it writes for other devices alone."""
    from torch._inductor.lowering import fallback_handler

    for name in _PRODUCTS:
        product = find_operator(name)
        own = lowerings.get(product)
        if own is not None:
            lowerings[product] = fallback_handler(product, add_to_fallback_set=False)
            patches.on_undo(functools.partial(lowerings.__setitem__, product, own))


def _widened(name: str, redirection: Redirection, own: Kernel) -> Kernel:
    import torch

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

    return kernel


def _product(name: str, redirection: Redirection) -> Kernel:
    import torch

    plain = getattr(torch, name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        *factors, out_dtype = args
        given = sum(factor.nbytes for factor in factors)
        redirection.fallback(f"torch.{name}", f"of {factors[-1].dtype}, in {out_dtype}", given)
        return plain(*(factor.to(out_dtype) for factor in factors), **kwargs)

    return kernel


def _wider() -> dict[torch.dtype, torch.dtype]:
    import torch

    return {torch.float16: torch.float32, torch.complex32: torch.complex64}


def _transform(own: Any, redirection: Redirection) -> Kernel:
    """Return a Fourier transform that takes what CUDA takes; of other dtypes it is torch's own, and so is its error."""
    import torch

    wider = _wider()
    narrower = {torch.float32: torch.float16, torch.complex64: torch.complex32}
    name = f"torch.{own._schema.name.removeprefix('aten::').replace('fft_', 'fft.')}"

    def widened(value: Any) -> Any:
        return value.to(wider.get(value.dtype)) if isinstance(value, torch.Tensor) else value

    def kernel(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = wider.get(x.dtype)
        if dtype is None:
            return own.decompose(x, *args, **kwargs)
        windows = (value.dtype for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        narrow = functools.reduce(torch.promote_types, windows, x.dtype) in wider
        if not narrow and name != "torch.istft":  # which transforms before it multiplies by the window
            return own.decompose(x, *args, **kwargs)
        redirection.fallback(name, f"of {x.dtype}, in {dtype}", x.numel() * x.element_size())
        made = own.decompose(x.to(dtype), *map(widened, args),
                                  **{key: widened(value) for key, value in kwargs.items()})  # fmt: skip
        if not narrow:
            return made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that complex32 is experimental, as it is on CUDA
            return made.to(narrower[made.dtype])

    return kernel


def _into(own: Any, kernel: Kernel, x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    import torch

    if x.dtype not in _wider():
        return own.decompose(x, *args, out=out, **kwargs)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise RuntimeError("functions with out=... arguments don't support automatic differentiation, but one of the "
                           "arguments requires grad.")  # fmt: skip
    made = kernel(x, *args, **kwargs)
    if made.dtype != out.dtype:
        raise RuntimeError(f"Expected out tensor to have dtype {made.dtype}, but got {out.dtype} instead")
    return out.resize_(made.shape).copy_(made)


def _grouped(name: str, redirection: Redirection) -> Kernel:
    """Return a grouped product of 8-bit numbers that are scaled by rows and columns: scaled first, then multiplied."""
    import torch

    def kernel(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
               offs: torch.Tensor | None = None, bias: Any = None, scale_result: Any = None,
               out_dtype: torch.dtype | None = None, use_fast_accum: bool = False) -> torch.Tensor:  # fmt: skip
        if bias is not None or scale_result is not None:
            raise RuntimeError("a grouped scaled product has neither a bias nor a scale of the result")
        inner = offs if a.ndim == b.ndim == 2 else None
        factors = _scaled(a, scale_a, inner, "scale_a"), _scaled(b.mT, scale_b, inner, "scale_b").mT
        redirection.fallback(f"torch.{name}", f"of {a.dtype}, in float32", a.nbytes + b.nbytes)
        return torch._grouped_mm(*factors, offs=offs).to(out_dtype or torch.bfloat16)

    def kernel_v2(
        a: torch.Tensor, b: torch.Tensor, scale_a: list[torch.Tensor], recipe_a: list[int], swizzle_a: list[int],
        scale_b: list[torch.Tensor], recipe_b: list[int], swizzle_b: list[int], offs: torch.Tensor | None = None,
        bias: Any = None, out_dtype: torch.dtype | None = None, contraction_dim: Any = (), fast: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        rows = [torch.nn.functional.ScalingType.RowWise.value]
        if not recipe_a == recipe_b == rows or any(swizzle_a) or any(swizzle_b):
            raise redirection.refuse(f"torch.{name}", "scales of blocks have no equivalent here", "scales of rows")
        return kernel(a, b, scale_a[0], scale_b[0], offs, bias, None, out_dtype, fast)

    return kernel_v2 if name.endswith("_v2") else kernel


def _scaled(x: torch.Tensor, scale: torch.Tensor, inner: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return rows times their scales in float32.

    Args:
        x: [..., R, K].
        scale: float32 [..., R]; where the groups are parts of K, [groups * R].
        inner: where those groups end; None: there are none.
        name: of the scale, for errors.

    Raises:
        RuntimeError: the scale has another shape or dtype.
    """
    import torch

    rows = x.shape[:-1] if inner is None else (len(inner) * x.shape[0],)
    if tuple(scale.shape) != tuple(rows) or scale.dtype != torch.float32:
        raise RuntimeError(f"{name} is {scale.dtype} {tuple(scale.shape)}, expected float32 {tuple(rows)}")
    if inner is None:
        return x.float() * scale[..., None]
    lengths = torch.diff(inner.long(), prepend=inner.new_zeros(1).long())
    of_each = scale.view(len(inner), x.shape[0]).mT.repeat_interleave(lengths, 1)
    return x[:, : of_each.shape[1]].float() * of_each
