# SPDX-License-Identifier: Apache-2.0
"""Whether the suite still computes in this process what it did: an implementation may replace what it works with.

`process_state` watches switches. What is replaced (a function of numpy's, of hashlib's or of the suite's) has none: it
shows in a result. A worker in which it does is replaced itself, so that no other case pays for it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from hal import philox
from hal_conformance import arrays as codec
from hal_conformance import inputs as make

_OURS = (philox, codec, make, hashlib)
"""Modules of which every name leads to what it led to; numpy has too many, and some of them come late."""


def reading() -> tuple[str, list[dict[str, Any]]]:
    """Return what is as it was before as long as these two are: to be compared with an earlier one.

    Returns:
        A digest of a little of everything that making, sending and hashing arrays needs, "" if that fails; and what the
        names of the modules lead to that are used for it.
    """
    import torch

    try:
        x = np.asarray(np.arange(12.0)).reshape(3, 4) / 7.0 - 1.0
        y = np.where(x > 0, np.sqrt(np.abs(x)), np.matmul(x, x.T) @ np.ones_like(x))
        words = np.bitwise_xor(np.multiply(np.arange(4, dtype=np.uint64), np.uint64(2**35 + 1)).view(np.uint32), 5)
        stored = make.store(np.concatenate([y.reshape(-1), np.ldexp(x, -3).ravel()]), "bfloat16")
        there = codec.from_torch(codec.to_torch(stored, torch.device("cpu")) * 2)
        order = np.argsort(np.stack([words, words[::-1]], axis=1).reshape(-1), kind="stable").astype(np.int64)
        blank = torch.empty_like(torch.ones(2)).numel() == 2 and not torch.empty(0).numel()
        plain = blank and not torch._is_functional_tensor(torch.ones(1))
        alike = plain and np.array_equal(np.asarray(codec.to_buffer(stored)), np.asarray(codec.to_buffer(there)))
        digests = codec.digests({"order": order, "there": there, "wide": np.ascontiguousarray(y)})
        return f"{digests} {alike} {np.isfinite(y).all()}", [dict(vars(module)) for module in _OURS]
    except BaseException:  # noqa: BLE001  a name that is None now, or whatever stands in its place
        return "", []


def has_room() -> bool:
    """Tell whether this process may still open a file and has memory: limits that were set stay for good."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
        return bool(np.zeros(64 << 20, np.uint8)[:: 1 << 12].sum() == 0)
    except BaseException:  # noqa: BLE001  as above
        return False
