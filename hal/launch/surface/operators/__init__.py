# SPDX-License-Identifier: Apache-2.0
"""Operators: the precision they run in, the kernel that runs, and what a device lacks."""

from hal.launch.surface.operators import (
    amp,
    attention,
    autocast,
    flash_kernels,
    kernels,
    lacking,
    optimizers,
    triton_kernels,
    widened,
)

__all__ = [
    "amp",
    "attention",
    "autocast",
    "flash_kernels",
    "kernels",
    "lacking",
    "optimizers",
    "triton_kernels",
    "widened",
]
