# SPDX-License-Identifier: Apache-2.0
"""Storages: what lies under tensors, which some programs move themselves, as while a checkpoint is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

door("torch.UntypedStorage", "torch.UntypedStorage.cuda", "torch.UntypedStorage.cpu", "torch.UntypedStorage.to",
     "torch.UntypedStorage.device", "torch.UntypedStorage.is_cuda")  # fmt: skip
door("torch.TypedStorage", "torch.TypedStorage.device", "torch.TypedStorage.is_cuda")


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

    def answers(name: str, true: Callable[[Any], Any], below: Callable[[Any], Any]) -> tuple[property, property]:
        """Return where a storage is, and whether that is CUDA, as torch's own code sees it or as the program does."""

        def device(self: Any) -> Any:
            r, frame, found = state.active(), sys._getframe(1), true(self)
            if r is None or inside(frame) or (r.hosts is not None and r.hosts.side_of_storage(below(self))):
                return found
            r.audit.count(f"{name}.device", frame, belief=True)
            return r.present(found)

        def is_cuda(self: Any) -> bool:
            r, frame, found = state.active(), sys._getframe(1), true(self)
            if r is None or inside(frame):
                return bool(found.type == "cuda")
            r.audit.count(f"{name}.is_cuda", frame, belief=True)
            on_host = r.hosts is not None and r.hosts.side_of_storage(below(self))
            return not on_host and bool(found.type == r.type)

        return property(device), property(is_cuda)

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

    patches.set(torch.storage, "_get_storage_from_sequence", of_sequence)
    patches.set(storage, "__new__", staticmethod(new))
    patches.set(storage, "cuda", cuda)
    patches.set(storage, "cpu", cpu)
    patches.set(storage, "to", to)
    # Those of old, with a dtype, ask the storage below them, which takes torch's own code for the asker.
    typed: Any = torch.storage.TypedStorage
    for owner, name, true, below in (
        (storage, "torch.UntypedStorage", true_device, lambda untyped: untyped),
        (typed, "torch.TypedStorage", typed.device.fget, lambda typed: typed._untyped_storage),
    ):
        device, is_cuda = answers(name, true, below)
        patches.set(owner, "device", device)
        patches.set(owner, "is_cuda", is_cuda)
