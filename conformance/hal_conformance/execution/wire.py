# SPDX-License-Identifier: Apache-2.0
"""Messages between a worker and its parent: a JSON header, then the raw bytes of the arrays it names.

    frame = header length (u32) · payload length (u64) · header · payload

No pickle: a worker runs foreign code, and its parent must not run what that code may write.
"""

from __future__ import annotations

import json
import struct
from typing import IO, TYPE_CHECKING, Any

from hal_conformance import arrays as codec

if TYPE_CHECKING:
    from hal_conformance.case import Arrays

MAGIC = b"\x00hal-conformance-wire-1\n"
"""Begins the worker's stream, so that what a start-up file prints before it can be told apart and skipped."""

MAX_HEADER = 16 << 20
MAX_PAYLOAD = 8 << 30
_FRAME = struct.Struct("<IQ")


class WireError(Exception):
    """The stream holds something else than a message, or ends within one."""


def send(stream: IO[bytes], header: dict[str, Any], arrays: Arrays | None = None) -> None:
    """Write one message and flush it.

    Raises:
        OSError: the other side is gone.
    """
    parts = [(name, codec.tag_of(array), array.shape, codec.to_buffer(array)) for name, array in (arrays or {}).items()]
    table = [[name, tag, list(shape), len(data)] for name, tag, shape, data in parts]
    text = json.dumps({**header, "arrays": table}).encode()
    stream.write(_FRAME.pack(len(text), sum(len(data) for *_, data in parts)) + text)
    for *_, data in parts:
        stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], Arrays] | None:
    """Read one message, or None at the end of the stream.

    Raises:
        WireError: what was read is no message.
    """
    frame = stream.read(_FRAME.size)
    if not frame:
        return None
    if len(frame) < _FRAME.size:
        raise WireError("ends within a frame")
    length, payload = _FRAME.unpack(frame)
    if length > MAX_HEADER or payload > MAX_PAYLOAD:
        raise WireError(f"a frame of {length} + {payload} bytes")
    try:
        header = json.loads(_exactly(stream, length))
        data = memoryview(_exactly(stream, payload))
        arrays: Arrays = {}
        for name, tag, shape, nbytes in header.pop("arrays"):
            arrays[name] = codec.from_bytes(data[:nbytes], tag, tuple(shape))
            data = data[nbytes:]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError(f"a message that cannot be read: {error!r}") from error
    return header, arrays


def skip_to_magic(stream: IO[bytes], limit: int = 1 << 20) -> bool:
    """Read up to and including the magic; False if the stream ends, or `limit` bytes pass, before it."""
    seen = b""
    for _ in range(limit):
        byte = stream.read(1)
        if not byte:
            return False
        seen = (seen + byte)[-len(MAGIC) :]
        if seen == MAGIC:
            return True
    return False


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise WireError("ends within a message")
    return data
