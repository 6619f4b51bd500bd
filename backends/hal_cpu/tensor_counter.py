# SPDX-License-Identifier: Apache-2.0
"""Bytes in CPU tensors, counted operator by operator, since torch's CPU allocator keeps no statistics."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# `torch.tensor` makes its tensor out of sight and then shows it to one of these operators.
_FRESH = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


@final
class TensorCounter(TorchDispatchMode):
    """Counts the bytes that live storages of dense CPU tensors have gained since it was entered, in this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counted = 0
        self._peak = 0
        self._known: dict[int, _Known] = {}  # by address: each living storage that was met

    @property
    def current(self) -> int:
        """Bytes now."""
        self._look_again()
        return self._counted

    @property
    def peak(self) -> int:
        """The largest since the start or `reset_peak()`."""
        self._look_again()
        return self._peak

    def reset_peak(self) -> None:
        """Start the peak anew from the current bytes."""
        self._peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of others, such as a distributed one: the operators on these come
        kwargs = kwargs or {}
        self._meet(args, created=func in _FRESH)
        self._meet(kwargs.values(), created=False)
        result = func(*args, **kwargs)
        self._meet((result,), created=True)
        return result

    def _meet(self, values: Iterable[Any], *, created: bool) -> None:
        """Take note of the storages in an operator's arguments, or in its results.

        Args:
            values: what is no dense CPU tensor is passed over.
            created: whether a storage that was not met before is new, and counts in full.
        """
        for storage in _storages(values):
            key, nbytes = storage._cdata, storage.nbytes()
            known = self._known.get(key)
            if known is None:
                # What cannot be resized was not allocated by torch: an array of numpy's, a file in memory.
                new = created and storage.resizable()
                # Another storage may take the address of a dead one, so a dead one is forgotten at once.
                known = self._known[key] = _Known(
                    weakref.ref(storage, functools.partial(self._forget, key)), before=0 if new else nbytes
                )
            self._count(known, nbytes)

    def _count(self, known: _Known, nbytes: int) -> None:
        gained = max(0, nbytes - known.before)
        self._counted += gained - known.counted
        known.counted = gained
        self._peak = max(self._peak, self._counted)

    def _forget(self, key: int, dead: object) -> None:
        self._counted -= self._known.pop(key).counted

    def _look_again(self) -> None:
        """Count the storages that were resized by no operator, as `untyped_storage().resize_()` does."""
        for known in list(self._known.values()):
            storage = known.storage()
            if storage is not None:
                self._count(known, storage.nbytes())


@dataclass
class _Known:
    """A living storage, the bytes that it had before it was counted, and those that count."""

    storage: weakref.ref[torch.UntypedStorage]
    before: int
    counted: int = 0


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _storages(value)
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided:
            value = value.untyped_storage()
        # The storage's device and not the tensor's: that of a fake tensor holds nothing.
        if isinstance(value, torch.UntypedStorage) and value.device.type == "cpu":
            yield value
