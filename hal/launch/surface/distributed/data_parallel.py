# SPDX-License-Identifier: Apache-2.0
"""torch.nn.DataParallel, one process with several devices: on a CPU torch knows of none, and hands its inputs on."""

from __future__ import annotations

import functools
import sys
from typing import Any

from hal.launch import api as state
from hal.launch.api import api
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.surface.cuda import comm as cuda_comm
from hal.launch.surface.distributed.parallel import asked_by_program
from hal.launch.surface.tensors.crossings import on_device, to_device


def install(redirection: Redirection, patches: Patches) -> None:
    """Let it see the devices that the program sees, and its inputs be where its module is."""
    if redirection.hosts is None:
        return
    import torch
    from torch.compiler import is_dynamo_compiling

    owner = torch.nn.DataParallel
    own_init, own_forward = owner.__init__, owner.forward

    def indices(self: Any) -> Any:
        r = asked_by_program()
        true, told = self.__dict__["device_ids"], self.__dict__.get("_hal_device_ids")
        return true if r is None or told is None else list(told)

    def put(self: Any, value: Any) -> None:
        self.__dict__["device_ids"] = value

    @functools.wraps(own_init)
    def init(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, dim: int = 0) -> None:
        own_init(self, module, device_ids, output_device, dim)
        r = state._active
        if r is None or not r.devices:
            return
        asked = range(len(r.devices)) if device_ids is None else device_ids
        told: Any = [r.index(device) for device in asked]
        output = asked[0] if output_device is None else output_device
        self.__dict__["_hal_device_ids"] = told
        self.dim = dim
        self.output_device = -1 if output == -1 else r.index(output)  # -1 is the host here
        self.src_device_obj = torch.device("cuda", told[0])
        if len(told) == 1:
            self.module.to(self.src_device_obj)

    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        r = state.active()
        if r is not None and not is_dynamo_compiling() and on_device(r, self.module):
            inputs, kwargs = to_device(r, (inputs, kwargs))
        return own_forward(self, *inputs, **kwargs)

    del init.__wrapped__
    patches.set(owner, "__init__", init)
    patches.set(owner, "forward", forward)
    patches.set(owner, "device_ids", property(indices, put))
    for pieces in (Scatter, Gather):
        patches.set(sys.modules["torch.nn.parallel.scatter_gather"], pieces.__name__, pieces)


@api("torch.nn.parallel.data_parallel")
def data_parallel(
    r: Redirection, module: Any, inputs: Any, device_ids: Any = None, output_device: Any = None, dim: int = 0,
    module_kwargs: Any = None,
) -> Any:  # fmt: skip
    """As the class does it: torch's own function finds no device of a kind that it knows on a CPU."""
    import torch

    if r.hosts is None:
        return torch.nn.parallel.data_parallel(module, inputs, device_ids, output_device, dim, module_kwargs)
    if not isinstance(inputs, tuple):
        inputs = () if inputs is None else (inputs,)
    return torch.nn.DataParallel(module, device_ids, output_device, dim)(*inputs, **(module_kwargs or {}))


class Scatter:
    """Pieces on each device: what a program's own DataParallel calls. torch's is of CUDA's own code."""

    @staticmethod
    def apply(devices: Any, sizes: Any, dim: int, tensor: Any) -> Any:
        """Return the pieces; gradients go through."""
        r = state._active
        assert r is not None
        return cuda_comm.scatter(r, tensor, devices, sizes, dim)


class Gather:
    """The pieces in one again."""

    @staticmethod
    def apply(device: Any, dim: int, *tensors: Any) -> Any:
        """Return the whole; of numbers a vector, as torch does, which warns of it."""
        r = state._active
        assert r is not None
        if dim == 0 and all(tensor.dim() == 0 for tensor in tensors):
            tensors = tuple(tensor.view(1) for tensor in tensors)
        return cuda_comm.gather(r, tensors, dim, device)
