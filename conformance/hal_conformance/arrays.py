# SPDX-License-Identifier: Apache-2.0
"""Arrays as bytes: dtype tags, storage integers for what numpy lacks, digests, and the way to torch and back.

A tag is a dtype's name as torch and ml_dtypes spell it. Only dtypes with a tag travel between a worker and its
parent, or into a recording.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

    from hal_conformance.case import Array, Arrays

_NATIVE = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

TAGS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        **{name: np.dtype(name) for name in _NATIVE},
        # e8m0 came with ml_dtypes 0.5.
        **{name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED if hasattr(ml_dtypes, name)},
    }
)
_NAMES = {dtype: tag for tag, dtype in TAGS.items()}


def tag_of(array: Array) -> str:
    """Return the tag of an array's dtype.

    Raises:
        TypeError: a dtype without a tag, such as complex64.
    """
    try:
        return _NAMES[array.dtype]
    except KeyError:
        raise TypeError(f"an array of dtype {array.dtype} cannot be exchanged") from None


def to_buffer(array: Array) -> memoryview:
    """Return the elements in row-major order, little-endian, without a copy where they lie so already."""
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


def from_bytes(data: bytes | memoryview, tag: str, shape: tuple[int, ...]) -> Array:
    """Return a read-only array over `data`.

    Raises:
        KeyError: no such tag.
        ValueError: the number of bytes does not fit the shape, or a bool is neither 0 nor 1.
    """
    dtype = TAGS[tag]
    # frombuffer knows neither ml_dtypes in every numpy, nor empty buffers: go through bytes.
    raw = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
    if tag == "bool" and raw.max(initial=0) > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    array = raw.view(dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def digest(array: Array) -> str:
    """Return the SHA-256 of dtype, shape and elements, as 64 hexadecimal digits.

    That of an array which is read-only and owns its memory, as those of `kept` are, is computed once: many tasks have
    the same weights.
    """
    lasting = isinstance(array, np.ndarray) and array.flags.owndata and not array.flags.writeable
    if lasting and (known := _DIGESTS.get(id(array))) is not None:
        return known
    head = f"{tag_of(array)} {'x'.join(map(str, array.shape))}\n".encode()
    running = hashlib.sha256(head)
    running.update(to_buffer(array))
    found = running.hexdigest()
    if lasting:
        _DIGESTS[id(array)] = found
        weakref.finalize(array, _DIGESTS.pop, id(array), None)
    return found


_DIGESTS: dict[int, str] = {}
"""By the identity of an array that lives."""


def digests(arrays: Arrays) -> dict[str, str]:
    """Return the digest of each array, by name."""
    return {name: digest(array) for name, array in arrays.items()}


def to_torch(array: Array, device: torch.device) -> torch.Tensor:
    """Copy an array to the device, whatever its dtype."""
    import torch

    tag = tag_of(array)
    owned = np.array(array, copy=True, order="C")
    if tag in _EXTENDED:
        carrier = owned.view(np.int16 if owned.itemsize == 2 else np.uint8)
        tensor = torch.from_numpy(carrier).view(getattr(torch, tag))
    else:
        tensor = torch.from_numpy(owned)
    if not owned.size:  # numpy's have strides of 0, which no user's tensor has, and torch's grouped product refuses
        tensor = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return tensor.to(device)


def from_torch(tensor: torch.Tensor) -> Array:
    """Copy a dense tensor to the host.

    Raises:
        TypeError: a dtype without a tag.
    """
    import torch

    tag = str(tensor.dtype).removeprefix("torch.")
    if tag not in TAGS:
        raise TypeError(f"a tensor of dtype {tag} cannot be exchanged")
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tag in _EXTENDED:
        carrier = host.view(torch.int16 if host.element_size() == 2 else torch.uint8)
        return carrier.numpy().view(TAGS[tag])
    array: Array = host.numpy()
    return array


def all_finite(array: Array) -> bool:
    """Tell whether no element is an infinity or a NaN."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return bool(np.isfinite(array).all())


def same_bits(a: Array, b: Array) -> bool:
    """Tell whether two arrays have the same dtype, shape and bits (NaN equals the same NaN; -0 differs from 0)."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def bits(array: Array) -> Array:
    """Return the elements' bits as unsigned integers of the same shape."""
    return np.array(array, copy=True, order="C").view(f"u{array.itemsize}")
