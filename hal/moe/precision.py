# SPDX-License-Identifier: Apache-2.0
"""The dtypes in which the operators compute, and autocast kept from changing them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores and sums: float32, or float64 for float64 (so that gradients can be
    checked)."""
    return torch.promote_types(dtype, torch.float32)


def model_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an ordinary linear layer would compute on `x`: autocast's, where it is on."""
    device = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products keep the dtypes they are given.

    Without it, autocast turns a float32 gate product into a bfloat16 one, and 1 to 2 % of tokens change
    experts.
    """
    device = x.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
