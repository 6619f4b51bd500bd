# SPDX-License-Identifier: Apache-2.0
"""Storages: what lies under tensors, which some programs move themselves, as while a checkpoint is loaded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

door("torch.UntypedStorage", "torch.UntypedStorage.cuda", "torch.UntypedStorage.cpu", "torch.UntypedStorage.to",
     "torch.UntypedStorage.device", "torch.UntypedStorage.is_cuda", "torch.UntypedStorage.get_device")  # fmt: skip
door("torch.TypedStorage", "torch.TypedStorage.device", "torch.TypedStorage.is_cuda", "torch.TypedStorage.get_device",
     "torch.TypedStorage.type")  # fmt: skip


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the moves of storages, and their answers to where they are."""
    import torch

    storage: Any = torch.UntypedStorage
    original_cuda, original_cpu, original_to = storage.cuda, storage.cpu, storage.to
    true_device = storage.device.__get__

    def moved(r: Redirection, source: Any, true: torch.device, host: bool) -> Any:
        """Copy if the storage crosses between host and device, or if nothing is known of it, as tensors do."""
        if r.hosts is None:
            return source.to(device=true)
        if r.hosts.side_of_storage(source) is not host and true_device(source).type == r.type:
            source = source.clone()
            r.hosts.add_storage(source, host)
        return source

    def cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        r = state.active()
        if r is None:
            return original_cuda(self, device, non_blocking)
        r.audit.count_outside("torch.UntypedStorage.cuda", sys._getframe(1))
        index = r.index(device)
        if index is None:
            raise RuntimeError(f"Invalid device, must be cuda device: {device}")
        return moved(r, self, r.targets[index], False)

    def cpu(self: Any) -> Any:
        r = state.active()
        # torch.save asks for a storage on the host, and reads it only.
        if r is None or r.hosts is None or inside(sys._getframe(1)):
            return original_cpu(self)
        return moved(r, self, true_device(self), True)

    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        r = state.active()
        if r is None or inside(sys._getframe(1)):
            return original_to(self, device=device, non_blocking=non_blocking)
        index = r.index(device)
        if index is not None:
            r.audit.count("torch.UntypedStorage.to", sys._getframe(1))
            return moved(r, self, r.targets[index], False)
        if r.hosts is not None and r.is_host(device):
            return moved(r, self, true_device(self), True)
        return original_to(self, device=device, non_blocking=non_blocking)

    def answers(name: str, owner: Any, true: Callable[[Any], Any], below: Callable[[Any], Any]) -> dict[str, Any]:
        """Return what says where a storage is, as torch's own code sees it or as the program does."""
        own_get_device = owner.get_device

        def seen(self: Any, frame: FrameType, asked: str) -> torch.device | None:
            """Return the CUDA device that the program sees; None: torch asks, or the storage is on none."""
            r = state.active()
            if r is None or inside(frame) or (r.hosts is not None and r.hosts.side_of_storage(below(self))):
                return None
            r.audit.count(f"{name}.{asked}", frame, belief=True)
            found = r.present(true(self))
            return found if found.type == "cuda" else None

        def device(self: Any) -> Any:
            return seen(self, sys._getframe(1), "device") or true(self)

        def is_cuda(self: Any) -> bool:
            return seen(self, sys._getframe(1), "is_cuda") is not None or true(self).type == "cuda"

        def get_device(self: Any) -> Any:
            found = seen(self, sys._getframe(1), "get_device")
            return own_get_device(self) if found is None else found.index

        return {"device": property(device), "is_cuda": property(is_cuda), "get_device": get_device}

    own_new: Any = torch._C.StorageBase.__new__

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        r, device = state.active(), kwargs.get("device")
        index = None if r is None or device is None else r.index(device)
        if r is None or index is None:
            made = own_new(cls, *args, **kwargs)
            hosts = None if r is None or inside(sys._getframe(1)) else r.hosts
            if r is not None and hosts is not None and (device is None or r.is_host(device)):
                hosts.add_storage(made)
            return made
        r.audit.count_outside("torch.UntypedStorage", sys._getframe(1))
        made = own_new(cls, *args, **(kwargs | {"device": r.targets[index]}))
        if r.hosts is not None:
            r.hosts.add_storage(made, False)
        return made

    own_of_sequence: Any = torch.storage._get_storage_from_sequence

    def of_sequence(sequence: Any, dtype: Any, device: Any) -> Any:
        r = state.active()
        true = device if r is None else r.translate(device)
        made = own_of_sequence(sequence, dtype, true)
        if r is not None and r.hosts is not None and true is not device:
            r.audit.count_nearest("torch.TypedStorage", sys._getframe(1))
            r.hosts.add_storage(made, False)
        return made

    def on_host(own: Any) -> Any:
        @functools.wraps(own)
        def make(*args: Any, **kwargs: Any) -> Any:
            made, r = own(*args, **kwargs), state.active()
            if r is not None and r.hosts is not None:
                r.hosts.add_storage(made)
            return made

        return staticmethod(make)

    def typed_cpu(self: Any) -> Any:
        r = state.active()
        if r is None or r.hosts is None or inside(sys._getframe(1)):
            return own_typed_cpu(self)
        below = self._untyped_storage
        return self._new_wrapped_storage(moved(r, below, true_device(below), True))

    for name in ("from_file", "from_buffer"):
        patches.set(storage, name, on_host(getattr(storage, name)))
    patches.set(torch.storage, "_get_storage_from_sequence", of_sequence)
    patches.set(storage, "__new__", staticmethod(new))
    patches.set(storage, "cuda", cuda)
    patches.set(storage, "cpu", cpu)
    patches.set(storage, "to", to)
    # Those of old, with a dtype, ask the storage below them, which takes torch's own code for the asker.
    typed: Any = torch.storage.TypedStorage
    own_typed_cpu = typed.cpu
    patches.set(typed, "cpu", typed_cpu)
    for owner, name, true, below in (
        (storage, "torch.UntypedStorage", true_device, lambda untyped: untyped),
        (typed, "torch.TypedStorage", typed.device.fget, lambda typed: typed._untyped_storage),
    ):
        for attribute, ours in answers(name, owner, true, below).items():
            patches.set(owner, attribute, ours)
    _types(patches, typed)


def _types(patches: Patches, typed: Any) -> None:
    """Let storages on the device be of CUDA's types, and of the host's no more."""
    import torch

    kinds: Any = vars(torch.storage)["_LegacyStorageMeta"]
    own_init, own_type, own_check = typed.__init__, typed.type, kinds.__instancecheck__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        r, device = state.active(), kwargs.get("device")
        made = kwargs.get("wrap_storage") is None  # by torch's code, for the program's: `torch.FloatStorage(4)`
        if made and r is not None and r.hosts is not None and (device is None or r.is_host(device)):
            r.hosts.add_storage(self._untyped_storage)

    def type_(self: Any, dtype: Any = None, non_blocking: bool = False) -> Any:
        found = own_type(self, dtype, non_blocking)
        if dtype is not None or inside(frame := sys._getframe(1)) or not _on_device(self):
            return found
        if (r := state.active()) is not None:
            r.audit.count("torch.TypedStorage.type", frame, belief=True)
        return found if found.endswith("TypedStorage") else f"torch.cuda.{found.rpartition('.')[2]}"

    def check(cls: Any, instance: Any) -> bool:
        if type(instance) is not typed or inside(sys._getframe(1)) or not _on_device(instance):
            return bool(own_check(cls, instance))
        return cls.__module__ == "torch.cuda" and bool(cls.dtype == instance.dtype)

    patches.set(typed, "__init__", init)
    patches.set(typed, "type", type_)
    patches.set(kinds, "__instancecheck__", check)


def _on_device(storage: Any) -> bool:
    """Return whether a storage with a dtype is on what the program sees as CUDA."""
    r, below = state.active(), storage._untyped_storage
    on_host = r is not None and r.hosts is not None and r.hosts.side_of_storage(below)
    return r is not None and below.device.type == r.type and not on_host
