# SPDX-License-Identifier: Apache-2.0
"""Libraries that bring kernels for CUDA, and what a program can do without them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """A library of kernels, or one that talks to NVIDIA's driver.

    Attributes:
        name: under which it is imported.
        what: it is, in a few words.
        runs_on: names of backends for which there is a build of it, its makers' own or the vendor's.
        instead: what to disable or to use where there is none.
    """

    name: str
    what: str
    runs_on: frozenset[str]
    instead: str


LIBRARIES: dict[str, Library] = {}

_NVIDIA = frozenset({"cuda"})
_BOTH = frozenset({"cuda", "rocm"})


def _enter(names: str, what: str, runs_on: frozenset[str], instead: str) -> None:
    for name in names.split():
        LIBRARIES[name] = Library(name, what, runs_on, instead)


_enter("triton", "a language for kernels", _BOTH | {"ascend"},
       "torch.compile writes kernels for the device; on Ascend install triton-ascend; uninstall triton where programs "
       "take its kernels because it is there")  # fmt: skip
_enter("flash_attn flash_attn_interface flash_attn_2_cuda", "attention kernels", _BOTH,
       "torch.nn.functional.scaled_dot_product_attention; attn_implementation=\"sdpa\" in transformers")  # fmt: skip
_enter("xformers", "attention kernels", _BOTH, "torch.nn.functional.scaled_dot_product_attention")
_enter("flashinfer", "attention kernels", _NVIDIA, "torch.nn.functional.scaled_dot_product_attention")
_enter("apex amp_C apex_C fused_layer_norm_cuda", "fused norms and optimisers", _BOTH,
       "torch.nn.LayerNorm, torch.nn.RMSNorm and torch.optim have fused forms of their own")  # fmt: skip
_enter("transformer_engine", "FP8 layers", _BOTH, "the model's option for torch's own layers")
_enter("bitsandbytes", "8-bit optimisers and weights", _BOTH | {"cpu"}, "torch.optim; unquantised weights")
_enter("grouped_gemm", "grouped matrix products", _NVIDIA, "torch.nn.functional.grouped_mm, or hal.moe's")
_enter("megablocks stk", "block-sparse experts", _NVIDIA, "hal.moe, or a loop over the experts")
_enter("tutel", "MoE layers", _BOTH | {"cpu"}, "hal.moe")
_enter("fmoe fmoe_cuda", "MoE layers", _BOTH, "hal.moe")
_enter("deep_ep", "all-to-all of tokens", _NVIDIA, "torch.distributed.all_to_all_single")
_enter("deep_gemm", "FP8 matrix products", _NVIDIA, "torch.nn.functional.scaled_mm")
_enter("mamba_ssm causal_conv1d", "state-space kernels", _BOTH, "the model's form in plain torch")
_enter("liger_kernel", "kernels in triton", _BOTH | {"ascend"}, "the model's own layers")
_enter("fla", "linear attention in triton", _BOTH | {"ascend"}, "the model's form in plain torch")
_enter("quack", "kernels for Hopper", _NVIDIA, "torch's own operators")
_enter("fast_hadamard_transform", "a transform", _NVIDIA, "a product with scipy.linalg.hadamard's matrix")
_enter("kernels", "kernels that are downloaded", _BOTH, "torch's own operators")
_enter("cupy cuda numba.cuda nvshmem", "access to CUDA itself", _NVIDIA, "torch's own operators")
_enter("pynvml nvtx nvidia_resiliency_ext", "access to NVIDIA's driver", _NVIDIA, "`hal devices`, torch.profiler")
_enter("torch.utils.cpp_extension", "builds extensions, and those in CUDA with nvcc", _BOTH | {"ascend", "cpu"},
       "an extension whose sources are C++ alone builds everywhere")  # fmt: skip


def advice(name: str, device: str) -> str:
    """Return what to add to the error of a module that is missing; nothing if it is of no library that is known here.

    Args:
        name: of the module, dotted.
        device: on which the program runs.
    """
    known = name
    while known and known not in LIBRARIES:
        known = known.rpartition(".")[0]
    if not known:
        return ""
    library = LIBRARIES[known]
    missing = known if known == name else f"such part of {known}"
    return f"; on {device} there is no {missing} ({library.what}): {library.instead}"
