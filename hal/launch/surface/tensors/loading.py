# SPDX-License-Identifier: Apache-2.0
"""Data loaders that pin: on a CPU nothing is locked, but batches are copies, as they are where CUDA pins them."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_MODULE = "torch.utils.data.dataloader"

door("torch.utils.data.DataLoader", f"{_MODULE}.DataLoader", note="on a CPU batches are copied, and nothing is locked")


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace what asks for pinned memory, and where batches come from."""
    when_loaded(_MODULE, "DataLoader", functools.partial(_asks, patches))
    if redirection.hosts is not None:
        when_loaded(_MODULE, "_BaseDataLoaderIter", functools.partial(_pins, patches))


def _asks(patches: Patches, loader: Any) -> None:
    original = loader.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        r = state._active
        given = {} if r is None else signature.bind_partial(self, *args, **kwargs).arguments
        if r is not None and (given.get("pin_memory") or given.get("pin_memory_device")):
            r.audit.count_nearest(f"{_MODULE}.DataLoader", sys._getframe(1))
        if "pin_memory_device" in kwargs and r is not None:
            kwargs["pin_memory_device"] = r.translate_type(kwargs["pin_memory_device"])
        original(self, *args, **kwargs)

    del constructor.__wrapped__
    patches.set(loader, "__init__", constructor)


def _pins(patches: Patches, batches: Any) -> None:
    from torch.utils.data import _utils

    original, following = batches.__init__, batches.__next__

    @functools.wraps(original)
    def constructor(self: Any, loader: Any) -> None:
        # Told to pin, torch looks for an accelerator, and warns that there is none.
        pins, loader.pin_memory = loader.pin_memory, False
        try:
            original(self, loader)
        finally:
            loader.pin_memory = pins
        self._hal_pins = pins

    @functools.wraps(following)
    def following_batch(self: Any) -> Any:
        batch = following(self)
        pins = getattr(self, "_hal_pins", False) and state._active is not None
        return _utils.pin_memory.pin_memory(batch) if pins else batch

    for name, function in (("__init__", constructor), ("__next__", following_batch)):
        del function.__wrapped__
        patches.set(batches, name, function)
