# SPDX-License-Identifier: Apache-2.0
"""What stands under `torch.cuda`, and under torch's names for it that name no vendor."""

from hal.launch.surface.cuda import (
    accelerator,
    comm,
    device,
    libraries,
    memory,
    plans,
    random,
    streams,
    tensor_types,
    tuning,
)

__all__ = [
    "accelerator",
    "comm",
    "device",
    "libraries",
    "memory",
    "plans",
    "random",
    "streams",
    "tensor_types",
    "tuning",
]
