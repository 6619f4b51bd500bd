# SPDX-License-Identifier: Apache-2.0
"""Tensors: how they are made, where they are, how they move, are kept and shown."""

from hal.launch.surface.tensors import (
    constructors,
    crossings,
    default_device,
    device_class,
    factories,
    loading,
    methods,
    net,
    packed_sequences,
    printing,
    storages,
    tensor_files,
)

__all__ = [
    "constructors",
    "crossings",
    "default_device",
    "device_class",
    "factories",
    "loading",
    "methods",
    "net",
    "packed_sequences",
    "printing",
    "storages",
    "tensor_files",
]
