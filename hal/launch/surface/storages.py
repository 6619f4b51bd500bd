# SPDX-License-Identifier: Apache-2.0
"""Storages: what lies under tensors, which some programs move themselves, as while a checkpoint is loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

door("torch.UntypedStorage.cuda", "torch.UntypedStorage.cpu", "torch.UntypedStorage.device",
     "torch.UntypedStorage.is_cuda")  # fmt: skip


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the moves of storages, and their answers to where they are."""
    import torch

    storage: Any = torch.UntypedStorage
    original_cuda, original_cpu = storage.cuda, storage.cpu
    true_device, true_is_cuda = storage.device.__get__, storage.is_cuda.__get__

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

    def device(self: Any) -> Any:
        r, frame = state.active(), sys._getframe(1)
        true = true_device(self)
        if r is None or inside(frame):
            return true
        if r.hosts is not None and r.hosts.side_of_storage(self):
            return true
        r.audit.count("torch.UntypedStorage.device", frame, belief=True)
        return r.present(true)

    def is_cuda(self: Any) -> bool:
        r, frame = state.active(), sys._getframe(1)
        if r is None or inside(frame):
            return bool(true_is_cuda(self))
        r.audit.count("torch.UntypedStorage.is_cuda", frame, belief=True)
        on_host = r.hosts is not None and r.hosts.side_of_storage(self)
        return not on_host and true_device(self).type == r.type

    patches.set(storage, "cuda", cuda)
    patches.set(storage, "cpu", cpu)
    patches.set(storage, "device", property(device))
    patches.set(storage, "is_cuda", property(is_cuda))
