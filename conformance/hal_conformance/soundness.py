# SPDX-License-Identifier: Apache-2.0
"""Whether the suite still computes in this process what it did: an implementation may replace what it works with.

`process_state` watches switches. What is replaced (a function of numpy's, of hashlib's or of the suite's) has none: it
shows in a result. A worker in which it does is replaced itself, so that no other case pays for it.
"""

from __future__ import annotations

import os

import numpy as np

from hal import philox
from hal_conformance import arrays as codec
from hal_conformance import inputs as make


def reading() -> str:
    """Return a digest of a little of everything that making, sending and hashing arrays needs; "" if that fails."""
    import torch

    try:
        x = np.asarray(np.arange(48.0)).reshape(6, 8) / 7.0 - 3.0
        y = np.where(x > 0, np.sqrt(np.abs(x)), np.matmul(x, x.T) @ np.ones_like(x))
        order = np.argsort(philox.bits(7, "soundness", 48), kind="stable")
        stored = make.store(np.concatenate([y.reshape(-1)[order], np.ldexp(x, -3).ravel()]), "bfloat16")
        there = codec.from_torch(codec.to_torch(stored, torch.device("cpu")) * 2)
        whole = {"order": order.astype(np.int64), "stored": stored, "there": there, "wide": np.ascontiguousarray(y)}
        blank = torch.empty_like(torch.ones(2)).numel() == 2 and not torch.empty(0).numel()
        plain = blank and not torch._is_functional_tensor(torch.ones(1))
        alike = plain and np.array_equal(np.asarray(codec.to_buffer(stored)), np.asarray(codec.to_buffer(there)))
        return f"{codec.digests(whole)} {alike} {np.isfinite(y).all()}"
    except BaseException:  # noqa: BLE001  a name that is None now, or whatever stands in its place
        return ""


def has_room() -> bool:
    """Tell whether this process may still open a file and has memory: limits that were set stay for good."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
        return bool(np.zeros(64 << 20, np.uint8)[:: 1 << 12].sum() == 0)
    except BaseException:  # noqa: BLE001  as above
        return False
