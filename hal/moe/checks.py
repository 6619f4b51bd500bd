# SPDX-License-Identifier: Apache-2.0
"""Checks of the operators' arguments: each raises a `ShapeError` that says what, where and what was
expected."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.errors import ShapeError

# What torch computes in on every device. The 8-bit formats are for storage, and torch's wider unsigned integers know
# no arithmetic; both would fail somewhere in the middle, in words of torch's.
FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_shape(where: str, name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Refuse what is no tensor of this shape; a string is a dimension of any size, by its name."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{where}: {name} is a {type(tensor).__name__}", expected=f"a tensor {_shown(shape)}")
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"{where}: {name} has shape {list(tensor.shape)}", expected=_shown(shape))


def check_floating(where: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not of one of `FLOATING_DTYPES`."""
    if tensor.dtype not in FLOATING_DTYPES:
        raise ShapeError(f"{where}: {name} has dtype {tensor.dtype}", expected=_names(FLOATING_DTYPES))


def as_index(where: str, name: str, tensor: Tensor) -> Tensor:
    """Return indices or counts in int64; refuse those that are not of one of `INDEX_DTYPES`.

    Nothing is to be computed in a narrower dtype: in uint8 the number of experts, 256, is 0.
    """
    if tensor.dtype not in INDEX_DTYPES:
        raise ShapeError(f"{where}: {name} has dtype {tensor.dtype}", expected=_names(INDEX_DTYPES))
    return tensor.to(torch.int64)


def check_same_dtype(where: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different dtypes: an operator stores in one dtype and never guesses which."""
    if tensor.dtype != other.dtype:
        raise ShapeError(
            f"{where}: {name} is {tensor.dtype} and {other_name} is {other.dtype}",
            expected="one dtype for both",
        )


def check_same_device(where: str, **tensors: Tensor | None) -> None:
    """Refuse tensors, given by name, that do not all lie on the device of the first; None is passed over."""
    (first_name, first), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != first.device:
            raise ShapeError(
                f"{where}: {first_name} lies on {first.device} and {name} on {tensor.device}",
                expected="one device for all",
            )


def check_count(where: str, name: str, value: int, least: int) -> None:
    """Refuse what is no integer of at least `least`; a bool is none."""
    # A SymInt stands for an int while torch traces.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise ShapeError(f"{where}: {name} is {value!r}", expected=f"an integer of at least {least}")


def check_range(where: str, name: str, index: Tensor, bound: int) -> None:
    """Refuse int64 indices outside [0, bound). Reads one bool back: the host waits for the device once."""
    if index.numel() and bool(((index < 0) | (index >= bound)).any()):
        low, high = (int(n) for n in torch.aminmax(index))
        raise ShapeError(f"{where}: {name} runs from {low} to {high}", expected=f"0 to {bound - 1}")


def _shown(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "one of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
