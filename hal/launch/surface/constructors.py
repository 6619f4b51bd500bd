# SPDX-License-Identifier: Apache-2.0
"""Classes of torch's that are given a device when they are made: torch's own classes stay, their arguments change."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from operator import is_ as _is
from typing import Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.caller import inside
from hal.launch.modules import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

door("torch.distributed.device_mesh.DeviceMesh", "torch.distributed.DeviceMesh")
door("torch.distributed.fsdp.FullyShardedDataParallel", "torch.nn.parallel.DistributedDataParallel",
     "torch.nn.parallel.distributed.DistributedDataParallel")  # fmt: skip
door("torch.utils.data.DataLoader", "torch.utils.data.dataloader.DataLoader", note="pins nothing on a CPU")


def install(redirection: Redirection, patches: Patches) -> None:
    """Translate what torch's constructors are given, of each class once somebody loads it."""
    for module, name, translate in (
        ("torch.distributed.device_mesh", "DeviceMesh", {"device_type": Redirection.translate_type}),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel",
         {"device_id": Redirection.translate}),
        ("torch.nn.parallel.distributed", "DistributedDataParallel",
         {"device_ids": _device_ids, "output_device": _output_device}),
        ("torch.utils.data.dataloader", "DataLoader",
         {"pin_memory": _pin_memory, "pin_memory_device": Redirection.translate_type}),
    ):  # fmt: skip
        when_loaded(module, name, functools.partial(_translated, patches, translate))
    when_loaded("torch.distributed.device_mesh", "DeviceMesh", functools.partial(_mesh_says_cuda, patches))


def _translated(patches: Patches, translate: Mapping[str, Any], owner: Any) -> None:
    """Replace a constructor by one that translates some of its arguments."""
    original, called = owner.__init__, f"{owner.__module__}.{owner.__qualname__}"
    places = {name: index for index, name in enumerate(inspect.signature(original).parameters)}

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        r = state._active
        if r is not None:
            changed, before = list(args), list(kwargs.values())
            for name, function in translate.items():
                place = places[name] - 1  # without self
                if name in kwargs:
                    kwargs[name] = function(r, kwargs[name])
                elif place < len(changed):
                    changed[place] = function(r, changed[place])
            if not (all(map(_is, changed, args)) and all(map(_is, kwargs.values(), before))):
                r.audit.count_nearest(called, sys._getframe(1))
            args = tuple(changed)
        original(self, *args, **kwargs)

    del constructor.__wrapped__
    patches.set(owner, "__init__", constructor)


def _mesh_says_cuda(patches: Patches, owner: Any) -> None:
    """Tell the program CUDA where it asks a mesh for its type of device."""
    from torch.compiler import is_compiling

    true = owner.device_type.fget

    def device_type(self: Any) -> str:
        found: str = true(self)
        r = state._active
        if r is None or is_compiling() or found != r.type or inside(sys._getframe(1)):
            return found
        return "cuda"

    patches.set(owner, "device_type", property(device_type, doc=owner.device_type.__doc__))


def _device_ids(r: Redirection, devices: Any) -> Any:
    # torch wants none for modules on a CPU.
    return devices if not devices or r.hosts is None else None


def _output_device(r: Redirection, device: Any) -> Any:
    return r.translate(device) if r.hosts is None else None


def _pin_memory(r: Redirection, pin: Any) -> Any:
    # On a CPU the device works on the host's memory: there is nothing to lock.
    return pin if r.hosts is None else False
