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
from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

door("torch.distributed.device_mesh.DeviceMesh", "torch.distributed.DeviceMesh")
door("torch.distributed.fsdp.FullyShardedDataParallel", "torch.nn.parallel.DistributedDataParallel",
     "torch.nn.parallel.distributed.DistributedDataParallel")  # fmt: skip
door("torch.futures.Future", "torch.optim.swa_utils.AveragedModel", "torch.distributed.pipelining.PipelineStage",
     "torch.distributed.pipelining.stage.PipelineStage")  # fmt: skip


def install(redirection: Redirection, patches: Patches) -> None:
    """Translate what torch's constructors are given, of each class once somebody loads it."""
    owners: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
        ("torch.distributed.device_mesh", "DeviceMesh", {"device_type": Redirection.translate_type}),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", {"device_id": _device_id}),
        ("torch.nn.parallel.distributed", "DistributedDataParallel",
         {"device_ids": _device_ids, "output_device": _output_device}),
        ("torch.distributed.pipelining.stage", "_PipelineStageBase", {"device": Redirection.translate}),
        ("torch.distributed.pipelining.stage", "PipelineStage", {"device": Redirection.translate}),
        ("torch.optim.swa_utils", "AveragedModel", {"device": _indexed}),
        ("torch.futures", "Future", {"devices": _devices}),
        # These make a tensor of a number, which looks for CUDA before any operator is called.
        *(("torch.nn.modules.batchnorm", name, {"device": Redirection.translate})
          for name in ("_NormBase", "_LazyNormBase")),
        *(("torch.ao.quantization.observer", name, {"factory_kwargs": _factory})
          for name in ("UniformQuantizationObserverBase", "MinMaxObserver", "PerChannelMinMaxObserver",
                       "HistogramObserver")),
    )  # fmt: skip
    for module, name, translate in owners:
        when_loaded(module, name, functools.partial(_translated, patches, translate))


def _translated(patches: Patches, translate: Mapping[str, Any], owner: Any) -> None:
    """Replace a constructor by one that translates some of its arguments."""
    original, called = owner.__init__, f"{owner.__module__}.{owner.__qualname__}"
    places = {name: index for index, name in enumerate(inspect.signature(original).parameters)}

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        r = state._active
        if r is not None:
            changed, before = list(args), dict(kwargs)
            for name, function in translate.items():
                place = places[name] - 1  # without self
                if name in kwargs:
                    kwargs[name] = function(r, kwargs[name])
                elif place < len(changed):
                    changed[place] = function(r, changed[place])
                elif function is _device_id:
                    kwargs[name] = function(r, None)
            if not (all(map(_is, changed, args)) and all(kwargs[name] is given for name, given in before.items())):
                r.audit.count_nearest(called, sys._getframe(1))
            args = tuple(changed)
        original(self, *args, **kwargs)

    del constructor.__wrapped__
    patches.set(owner, "__init__", constructor)


def _factory(r: Redirection, given: Any) -> Any:
    return given if not given or "device" not in given else {**given, "device": r.translate(given["device"])}


def _indexed(r: Redirection, device: Any) -> Any:
    # torch moves modules by it, which knows CUDA, and makes a tensor of it, which the net knows by its index alone.
    import torch

    index = None if device is None or r.hosts is None else r.index(device)
    return r.translate(device) if index is None else torch.device("cuda", index)


def _device_id(r: Redirection, device: Any) -> Any:
    # A sharded model looks for an accelerator where it is told no device.
    return r.targets[r.current] if device is None and r.hosts is not None else r.translate(device)


def _devices(r: Redirection, devices: Any) -> Any:
    # A future waits for streams of accelerators alone; what is no CUDA device is left to torch, and so is its error.
    return devices and [r.translate(device) for device in devices if r.index(device) is None or r.hosts is None]


def _device_ids(r: Redirection, devices: Any) -> Any:
    # torch wants none for modules on a CPU.
    return devices if not devices or r.hosts is None else None


def _output_device(r: Redirection, device: Any) -> Any:
    return r.translate(device) if r.hosts is None else None
