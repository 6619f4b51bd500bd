# SPDX-License-Identifier: Apache-2.0
"""The file of a recording: safetensors, of which every bit is covered by a digest, and a reader that trusts nothing.

    header length (u64) · {"__metadata__":{"sha256":"<64 digits>", ...}, "<name>":{...}, ...} · data

The digest comes first in the header, so its place is fixed. It is the SHA-256 of the whole file with its own 64
characters taken as the character 0. It detects alteration, not forgery: a forged file has a right digest, so the
reader bounds what it allocates, and checks each entry, all the same. Any safetensors reader can open the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hal_conformance import arrays as codec
from hal_conformance.case import Array, Arrays
from hal_conformance.text import plain

MAX_FILE = 64 << 20
"""Bytes of a recording, written or read: a dozen times what scale small takes, which is held in memory."""
MAX_HEADER = 1 << 20
"""Bytes of a header, which holds the manifest: some 10 KB."""
MAX_NESTING = 16
"""Objects inside of each other in JSON; a manifest has five. What holds them is pickled and flattened, level by level.
"""
MAX_DIMENSIONS = 8
MAX_EXTENT = 2**31

_PREFIX = b'{"__metadata__":{"sha256":"'
_START = 8 + len(_PREFIX)
_END = _START + 64
_ZEROS = b"0" * 64

# What safetensors' numpy loader refuses, or loads as something else, is stored as integers.
_STORED: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
        "float32": "F32", "float64": "F64", "float16": "U16", "bfloat16": "U16",
        **{tag: "U8" for tag in codec.TAGS if tag.startswith("float8")},
    }
)  # fmt: skip
_ITEM = MappingProxyType({"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "I64": 8, "F32": 4, "F64": 8})


class Unreadable(ValueError):
    """A file is no recording, or was altered. The text is one line and safe to print."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its storage dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self, tag: object) -> Array:
        """Return the tensor as an array of the tagged dtype.

        Raises:
            Unreadable: the tag is unknown, or is not stored in this way.
        """
        if not isinstance(tag, str) or _STORED.get(tag) != self.dtype or tag not in codec.TAGS:
            raise Unreadable(f"a tensor stored as {self.dtype} is tagged {plain(tag, 40)}")
        try:
            return codec.from_bytes(self.data, tag, self.shape)
        except ValueError as error:
            raise Unreadable(f"a tensor cannot be read: {plain(error)}") from error


def encode(metadata: Mapping[str, str], tensors: Arrays) -> bytes:
    """Return the bytes of a file. The same content gives the same bytes.

    Args:
        metadata: text by name, without the digest, which is added.
        tensors: arrays by name, in the order in which they are to be stored.
    """
    header: dict[str, Any] = {"__metadata__": {"sha256": _ZEROS.decode(), **metadata}}
    parts: list[bytes | memoryview] = []
    offset = 0
    for name, array in tensors.items():
        data = codec.to_buffer(array)
        header[name] = {
            "dtype": _STORED[codec.tag_of(array)],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    running = hashlib.sha256(head)
    for part in parts:
        running.update(part)
    return b"".join([head[:_START], running.hexdigest().encode(), head[_END:], *parts])


def decode(data: bytes) -> tuple[dict[str, str], dict[str, Stored]]:
    """Return metadata and tensors of a file's bytes, without copying a tensor.

    Raises:
        Unreadable: this is no recording, or it was altered or truncated.
    """
    if len(data) < _END or data[8:_START] != _PREFIX:
        raise Unreadable("this is no recording of hal conformance")
    if not re.fullmatch(rb"[0-9a-f]{64}", data[_START:_END]) or data[_START:_END] != _digest(data).encode():
        raise Unreadable("the file was altered or truncated: its SHA-256 does not match")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or 8 + length > len(data):
        raise Unreadable(f"a header of {length} bytes in a file of {len(data)}")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise Unreadable("the header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Unreadable("the metadata are not text by name")
    return metadata, dict(_entries(header, memoryview(data)[8 + length :]))


def read(path: Path) -> bytes:
    """Read a whole file of bounded size.

    Raises:
        Unreadable: it cannot be opened, is no regular file, or is too large.
    """
    try:
        facts = path.stat()  # before it is opened: opening a pipe would wait for a writer
        if not stat.S_ISREG(facts.st_mode):
            raise Unreadable("this is no regular file")
        if facts.st_size > MAX_FILE:
            raise Unreadable(f"{facts.st_size} bytes; a recording has at most {MAX_FILE}")
        # Some files of the system are regular by name, and would wait for news.
        with os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as file:
            return file.read(MAX_FILE) or b""
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"cannot be read: {plain(error)}") from error


def deflate(data: bytes | memoryview) -> Array:
    """Return bytes in the format of zlib, as a tensor."""
    return np.frombuffer(zlib.compress(data, 9), np.uint8)


def inflate(tensor: Array, limit: int) -> bytes:
    """Return what was deflated.

    Raises:
        Unreadable: it is not in that format, or has more than `limit` bytes.
    """
    stream = zlib.decompressobj()
    try:
        # One more than the limit: 0 would mean that there is none.
        found = stream.decompress(tensor.tobytes(), limit + 1)
    except zlib.error as error:
        raise Unreadable(f"bytes that cannot be inflated ({plain(error, 60)})") from error
    if len(found) > limit or not stream.eof or stream.unused_data:
        raise Unreadable("deflated bytes that have no end, or something after it, or are too many")
    return found


def parse_json(text: bytes | str) -> Any:
    """Parse JSON that may be hostile.

    Raises:
        Unreadable: bad syntax, duplicate names, NaN or infinity, enormous numbers, or nesting beyond reason.
    """
    try:
        found = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_short_integer, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"JSON that cannot be read ({plain(error, 80)})") from error
    level = [found]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for item in level if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]  # fmt: skip
        if not level:
            return found
    raise Unreadable(f"JSON that is nested more than {MAX_NESTING} deep")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999 is a number in JSON, and infinite here
        raise ValueError(f"the number {text[:20]}")
    return number


def _digest(data: bytes) -> str:
    running = hashlib.sha256(data[:_START])
    running.update(_ZEROS)
    running.update(memoryview(data)[_END:])
    return running.hexdigest()


def _entries(header: dict[str, Any], data: memoryview) -> Iterable[tuple[str, Stored]]:
    """Yield the tensors; together they must cover the data exactly, in order, without a gap or an overlap."""
    position = 0
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Unreadable(f"the entry {plain(name, 60)} is no tensor")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM or not _counts(shape, MAX_EXTENT):
            raise Unreadable(f"the tensor {plain(name, 60)} has no dtype or shape that is known")
        size = math.prod(shape) * _ITEM[dtype]
        if len(shape) > MAX_DIMENSIONS or not _counts(offsets, MAX_FILE) or offsets != [position, position + size]:
            raise Unreadable(f"the tensor {plain(name, 60)} is not where its shape says")
        yield name, Stored(dtype, tuple(shape), data[position : position + size])
        position += size
    if position != len(data):
        raise Unreadable(f"the tensors take {position} bytes, and there are {len(data)}")


def _counts(value: object, limit: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= limit for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"the number {text}")


def _short_integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)
