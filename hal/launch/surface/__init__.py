# SPDX-License-Identifier: Apache-2.0
"""The doors through which a program reaches CUDA, one file for each; importing this fills the table of APIs."""

from hal.launch.surface import (
    accelerator,
    amp,
    attention,
    collectives,
    compiler,
    constructors,
    crossings,
    cuda_device,
    cuda_memory,
    cuda_random,
    cuda_streams,
    cuda_types,
    default_device,
    distributed,
    operators,
    script,
    storages,
    tensors,
)

__all__ = [
    "accelerator",
    "amp",
    "attention",
    "collectives",
    "compiler",
    "constructors",
    "crossings",
    "cuda_device",
    "cuda_memory",
    "cuda_random",
    "cuda_streams",
    "cuda_types",
    "default_device",
    "distributed",
    "operators",
    "script",
    "storages",
    "tensors",
]
