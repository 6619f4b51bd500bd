# SPDX-License-Identifier: Apache-2.0
"""Operators that multiply inside a kernel of their own, where no simulated unit reaches: they are counted.

torch's own names, by the dispatch key of the kernel. Products of two vectors are none of them: `dot` is a sum, `addr`
has none, and a card has no matrix unit for either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hal.torch_kernels import has_kernel

_ATEN: Mapping[str, tuple[str, ...]] = {
    "CPU": (
        "mkldnn_rnn_layer", "_transformer_encoder_layer_fwd", "_native_multi_head_attention",
        "_slow_conv2d_forward", "_slow_conv2d_backward", "slow_conv3d_forward", "slow_conv_transpose2d",
        "slow_conv_transpose3d", "slow_conv_dilated2d", "slow_conv_dilated3d", "_nnpack_spatial_convolution",
        "mkldnn_convolution", "mkldnn_rnn_layer_backward", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu",
        "_dyn_quant_matmul_4bit", "_cdist_forward", "_cdist_backward",
        # Decompositions and solvers, whose libraries multiply blocks.
        "cholesky", "linalg_cholesky_ex", "cholesky_inverse", "_cholesky_solve_helper", "linalg_inv_ex",
        "_linalg_solve_ex", "linalg_solve_triangular", "triangular_solve", "linalg_lu", "linalg_lu_factor_ex",
        "linalg_lu_solve", "linalg_ldl_factor_ex", "linalg_ldl_solve", "linalg_qr", "geqrf", "ormqr",
        "linalg_householder_product", "linalg_lstsq", "_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals",
        "linalg_eigvals", "_linalg_det", "_linalg_slogdet", "quantized_lstm", "quantized_gru",
    ),
    "SparseCPU": ("mm", "addmm", "addmm_", "bmm", "mv", "hspmm", "sspaddmm", "_sparse_sparse_matmul"),
    "SparseCsrCPU": (
        "mm", "addmm", "addmv", "_sparse_mm_reduce_impl", "_sparse_mm_reduce_impl_backward", "sparse_sampled_addmm",
        "triangular_solve",
    ),
    "MkldnnCPU": (
        "mkldnn_convolution", "mkldnn_linear_backward", "mkldnn_linear_backward_input",
        "mkldnn_linear_backward_weights", "mkldnn_rnn_layer",
    ),
    "NestedTensorCPU": ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
}  # fmt: skip

_PACKED = (
    "fbgemm_linear_int8_weight", "fbgemm_linear_int8_weight_fp32_activation", "fbgemm_linear_fp16_weight",
    "fbgemm_linear_fp16_weight_fp32_activation",
)  # fmt: skip
"""Layers with packed weights, which no gradient passes; torch has them for all keys at once."""

_LIBRARIES = ("mkldnn", "mkldnn_prepacked", "mkl", "onednn", "quantized", "_quantized", "sparse")
"""Namespaces of torch's operators that hand whole layers to another library, packed or quantised."""
_OF_ALL = "CompositeExplicitAutograd"
_LAYERS = re.compile(r"(?!.*((pre|un)pack(?!ed)|pack_gemm|reorder)).*(linear|conv|matmul|mm|gru|lstm|rnn)")
_KEYS = ("CPU", "QuantizedCPU", "MkldnnCPU")


def own_kernels() -> Iterator[tuple[Any, str]]:
    """Yield the operators of this version of torch, each with a dispatch key for which it has a kernel."""
    import torch

    for key, names in _ATEN.items():
        for packet in filter(None, (getattr(torch.ops.aten, name, None) for name in names)):
            for overload in packet.overloads():
                operator = getattr(packet, overload)
                # Some kernels that serve the CPU are registered for every device.
                if has_kernel(operator, key) or (key in ("CPU", "MkldnnCPU") and has_kernel(operator, _OF_ALL)):
                    yield operator, key
    for packet in filter(None, (getattr(torch.ops.aten, name, None) for name in _PACKED)):
        yield from ((getattr(packet, overload), "CPU") for overload in packet.overloads())
    for whole in torch._C._dispatch_get_all_op_names():
        namespace, _, name = whole.partition("::")
        if namespace in _LIBRARIES and _LAYERS.match(name):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            yield from ((operator, key) for key in _KEYS if has_kernel(operator, key))
