# SPDX-License-Identifier: Apache-2.0
"""Checks of the operators' arguments: each raises a `ShapeError` that says what, where and what was
expected."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.errors import ShapeError


def check_shape(where: str, name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Refuse `tensor` unless it has this shape; a string is a dimension of any size, by its name."""
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"{where}: {name} has shape {list(tensor.shape)}",
            expected="[" + ", ".join(str(n) for n in shape) + "]",
        )


def check_floating(where: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not of a floating-point dtype."""
    if not tensor.is_floating_point():
        raise ShapeError(f"{where}: {name} has dtype {tensor.dtype}", expected="a floating-point dtype")


def check_integral(where: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not of an integer dtype (a bool is none)."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ShapeError(f"{where}: {name} has dtype {tensor.dtype}", expected="an integer dtype")


def check_same_dtype(where: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different dtypes: an operator stores in one dtype and never guesses which."""
    if tensor.dtype != other.dtype:
        raise ShapeError(
            f"{where}: {name} is {tensor.dtype} and {other_name} is {other.dtype}",
            expected="one dtype for both",
        )


def check_range(where: str, name: str, index: Tensor, bound: int) -> None:
    """Refuse indices outside [0, bound). Reads one bool back: the host waits for the device once."""
    if index.numel() and bool(((index < 0) | (index >= bound)).any()):
        low, high = (int(n) for n in torch.aminmax(index))
        raise ShapeError(f"{where}: {name} runs from {low} to {high}", expected=f"0 to {bound - 1}")
