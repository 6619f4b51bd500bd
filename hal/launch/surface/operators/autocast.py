# SPDX-License-Identifier: Apache-2.0
"""Which operators `autocast("cuda")` runs in which dtype, on a CPU, too.

torch has a list for each type of device, and a CPU's differs: there `softmax`, `sum`, `exp` or `layer_norm` stay in
the 16 bits in which CUDA's list takes them to float32. While a CPU is adopted the rules of CUDA's list are registered
for the CPU's autocast key. They hold where the autocast in force was asked for as CUDA's, which CUDA's own flag says:
no tensor on a CPU has its key, and torch hands the flag on wherever it hands on autocast's state, to the guards of
compiled code and to what a checkpoint computes again. A program's own `autocast("cpu")` keeps the CPU's rules.

The rules are those of torch's own ATen/autocast_mode.h. An operator costs some 10 microseconds more inside autocast,
and several times that where caches are cold.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.surface.operators.widened import TRANSFORMS
from hal.torch_kernels import Kernel, can_replace, find_operator, has_kernel, register, replace_kernel

_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
    "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim",
    "cosine_similarity", "dist", "pdist", "renorm", "logsumexp", "upsample_nearest1d",
    "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_nearest3d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
"""Computed in float32. Losses, cdist and prod are so by the CPU's own rules."""

_FP32_UNLESS_ASKED = (
    "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
)  # fmt: skip
"""Computed in float32, unless the call names a dtype."""

_LOWER = (
    "convolution", "_convolution", "addmv", "addr", "mv", "einsum", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "prelu", "gru.input", "gru.data", "rnn_tanh.input", "rnn_tanh.data", "rnn_relu.input", "rnn_relu.data",
)  # fmt: skip
"""Computed in autocast's own dtype."""

_WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "tensordot", "scatter_add",
    "grid_sampler",
)  # fmt: skip
"""Computed in the widest dtype among the arguments."""

_ROUNDED = (
    "adaptive_avg_pool3d", "adaptive_max_pool3d", "avg_pool3d", "max_pool3d", "reflection_pad1d",
    "reflection_pad2d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "trace",
    "max_unpool2d", "max_unpool3d", "fractional_max_pool2d", "fractional_max_pool3d",
)  # fmt: skip
"""Of the dtype that they are given by CUDA's rules; a CPU computes some of them in float32 alone."""

_AS_THEY_ARE = ("cat", "stack", "index_copy", "view_as_complex", "fake_quantize_per_tensor_affine", *TRANSFORMS)
"""On no list of CUDA's: computed as without autocast, where the CPU's own rules widen or refuse."""

_BANNED = (
    "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
    "Many models use a sigmoid layer right before the binary cross entropy layer.\n"
    "In this case, combine the two layers using torch.nn.functional.binary_cross_entropy_with_logits\n"
    "or torch.nn.BCEWithLogitsLoss.  binary_cross_entropy_with_logits and BCEWithLogits are\n"
    "safe to autocast."
)  # torch's own words

Rule = Callable[..., Any]


def install(redirection: Redirection, patches: Patches) -> None:
    """Register CUDA's rules for a CPU's autocast; other devices' plug-ins bring their own."""
    import torch

    if redirection.hosts is None:
        return
    library = torch.library.Library("aten", "IMPL")
    patches.on_undo(library._destroy)
    for names, make in ((_FP32, _fp32), (_FP32_UNLESS_ASKED, _fp32_unless_asked), (_LOWER, _lower),
                        (_WIDEST, _widest), (_ROUNDED, _rounded), (_AS_THEY_ARE, _bound)):  # fmt: skip
        for name in names:
            _register(library, name, make)
    for name in ("norm.Scalar", "norm.ScalarOpt_dim"):
        _register(library, name, _norm)
    _register(library, "binary_cross_entropy", _banned)
    for name in ("lstm.input", "lstm.data"):
        _register(library, name, lambda operator: _lstm(operator, redirection))


def _register(library: Any, name: str, make: Callable[[Any], Rule]) -> None:
    """Register a rule; where the CPU has one of its own, that holds outside of CUDA's autocast."""
    import torch

    own_operator = find_operator(name)
    if own_operator is None:  # another version of torch
        return
    rule, key = make(own_operator), "AutocastCPU"
    in_force, without = torch.is_autocast_enabled, torch._C._ExcludeDispatchKeyGuard
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with without(autocast):
            return rule(*args, **kwargs) if in_force("cuda") else own_operator(*args, **kwargs)

    def instead_of(own: Kernel) -> Kernel:
        def kernel_instead(keys: Any, *args: Any, **kwargs: Any) -> Any:
            return kernel(*args, **kwargs) if in_force("cuda") else own(keys, *args, **kwargs)

        return kernel_instead

    if not has_kernel(own_operator, key):
        register(library, own_operator, key, kernel)
    elif can_replace():
        replace_kernel(library, own_operator, key, instead_of)


def _taken_to(dtype: Any) -> Callable[[Any], Any]:
    """Return a function that takes to a dtype what autocast touches: floating tensors but for float64, and lists."""
    import torch

    tensor, double, to = torch.Tensor, torch.float64, torch._C.TensorBase.to

    def taken(value: Any) -> Any:
        if isinstance(value, tensor):
            kind = value.dtype
            return to(value, dtype) if kind.is_floating_point and kind is not dtype and kind is not double else value
        return [taken(part) for part in value] if isinstance(value, (list, tuple)) else value

    return taken


def _bound(operator: Any) -> Callable[..., Any]:
    """Return what Python calls an operator by: torch's own function of that name, where it is one of C's.

    An overload among `torch.ops` matches its arguments against the schema at every call. Measured with cold caches, as
    between two large kernels: 45 microseconds more for a layer norm, which takes 200 by itself.
    """
    import torch

    function = getattr(torch, operator._schema.name.removeprefix("aten::"), None)
    return function if isinstance(function, BuiltinFunctionType) else operator


def _fp32(operator: Any) -> Rule:
    import torch

    taken, fp32, call = _taken_to(torch.float32), torch.float32, _bound(operator)
    places = [at for at, argument in enumerate(operator._schema.arguments) if "Tensor" in str(argument.type)]
    lists = any("List" in str(operator._schema.arguments[at].type) for at in places)

    def rule(*args: Any, **kwargs: Any) -> Any:
        # Most often all are so already, and a step of training pays for every line that is run between two kernels.
        count = len(args)
        if not lists and not kwargs:
            for at in places:
                if at < count and args[at] is not None and args[at].dtype is not fp32:
                    break
            else:
                return call(*args)
        return call(*map(taken, args), **{name: taken(value) for name, value in kwargs.items()})

    return rule


def _fp32_unless_asked(operator: Any) -> Rule:
    import torch

    call = _bound(operator)
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index("dtype")

    def rule(*args: Any, **kwargs: Any) -> Any:
        asked = args[place] if len(args) > place else kwargs.get("dtype")
        if asked is None and _touched(args[0]):
            return call(*args[:place], *args[place + 1 :], **{**kwargs, "dtype": torch.float32})
        return call(*args, **kwargs)

    return rule


def _touched(value: Any) -> bool:
    import torch

    return bool(value.dtype.is_floating_point) and value.dtype is not torch.float64


def _norm(operator: Any) -> Rule:
    import torch

    def rule(self: Any, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Any:
        dtype = torch.float32 if _touched(self) else self.dtype
        if dim is None:
            return torch.ops.aten.norm.ScalarOpt_dtype(self, p, dtype=dtype)
        return torch.ops.aten.norm.ScalarOpt_dim_dtype(self, p, dim, keepdim, dtype=dtype)

    return rule


def _lower(operator: Any) -> Rule:
    import torch

    by_dtype = {dtype: _taken_to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}

    def rule(*args: Any, **kwargs: Any) -> Any:
        taken = by_dtype[torch.get_autocast_dtype("cpu")]
        return operator(*map(taken, args), **{name: taken(value) for name, value in kwargs.items()})

    return rule


def _widest(operator: Any) -> Rule:
    import torch

    to_fp32 = _taken_to(torch.float32)

    def rule(*args: Any, **kwargs: Any) -> Any:
        # A rule of two dtypes: what is float32 anywhere makes all of it so; otherwise all have autocast's dtype.
        if any(isinstance(value, torch.Tensor) and value.dtype is torch.float32 for value in args):
            return operator(*map(to_fp32, args), **kwargs)
        return operator(*args, **kwargs)

    return rule


def _rounded(operator: Any) -> Rule:
    import torch

    to_fp32 = _taken_to(torch.float32)
    back = {dtype: _taken_to(dtype) for dtype in (torch.float16, torch.bfloat16)}

    def rule(*args: Any, **kwargs: Any) -> Any:
        taken = back.get(args[0].dtype)
        if taken is None:
            return operator(*args, **kwargs)
        made = operator(*map(to_fp32, args), **kwargs)
        return tuple(map(taken, made)) if isinstance(made, tuple) else taken(made)

    return rule


def _banned(operator: Any) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(_BANNED)

    return rule


def _lstm(operator: Any, redirection: Redirection) -> Rule:
    """A CPU without arithmetic in float16 has no LSTM in it: computed in float32, and rounded to autocast's dtype."""
    import torch

    lower, to_fp32, to_fp16 = _lower(operator), _taken_to(torch.float32), _taken_to(torch.float16)
    has_fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()

    def rule(*args: Any, **kwargs: Any) -> Any:
        if has_fp16 or torch.get_autocast_dtype("cpu") is not torch.float16:
            return lower(*args, **kwargs)
        redirection.fallback("torch.nn.LSTM", "in float16, in float32", args[0].nbytes)
        return tuple(to_fp16(operator(*map(to_fp32, args), **kwargs)))

    return rule
