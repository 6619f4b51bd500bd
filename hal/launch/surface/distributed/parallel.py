# SPDX-License-Identifier: Apache-2.0
"""Parallel and sharded models: what torch's own code allows on an accelerator alone, and where they say that they are.

On a CPU that stands for CUDA the checks of torch's are wrong: a sharded model may send its state, parts of it may stay
on the host, gradients may travel in bfloat16. The program is told CUDA where it asks a mesh or a model for a device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from hal.launch import api as state
from hal.launch.awaited import when_loaded
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.stand_ins import StandIn
from hal.launch.surface.distributed import process_groups


def install(redirection: Redirection, patches: Patches) -> None:
    """Change the classes and functions, once somebody loads them."""
    when_loaded("torch.distributed.device_mesh", "DeviceMesh", functools.partial(_mesh, patches))
    when_loaded("torch.distributed.distributed_c10d", "ProcessGroup", functools.partial(_group, patches))
    when_loaded("torch.nn.parallel.distributed", "DistributedDataParallel", functools.partial(_parallel, patches))
    when_loaded("torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook", "PostLocalSGDState",
                functools.partial(_local, redirection, patches))  # fmt: skip
    when_loaded("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel",
                lambda owner: patches.set(owner, "compute_device", _told("compute_device", _device)))  # fmt: skip
    if redirection.hosts is None:
        return
    import torch

    if not hasattr(torch.cpu.Stream, "synchronize"):  # which parameters that stay on the host wait for
        patches.set(torch.cpu.Stream, "synchronize", lambda self: None)
    name, module = "_check_module_states_for_sync_module_states", "torch.distributed.fsdp._init_utils"
    when_loaded(module, name, lambda _: patches.set(sys.modules[module], name, lambda states: None))


# Where they say that they are ----------------------------------------------------------------------------------------


def _type(r: Redirection, true: Any) -> Any:
    return "cuda" if true == r.type else true


def _device(r: Redirection, true: Any) -> Any:
    import torch

    return r.present(true) if isinstance(true, torch.device) else true


def asked_by_program() -> Redirection | None:
    """Return the redirection in force if the caller's caller is the program."""
    from torch.compiler import is_dynamo_compiling

    if is_dynamo_compiling() or inside(sys._getframe(2)):
        return None
    return state._active


def _told(name: str, present: Callable[[Redirection, Any], Any]) -> property:
    """Return a property in place of an attribute of an instance: the program is told CUDA."""

    def get(self: Any) -> Any:
        try:
            true = self.__dict__[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        r = asked_by_program()
        return true if r is None else present(r, true)

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _mesh(patches: Patches, owner: Any) -> None:
    true = owner.device_type.fget

    def device_type(self: Any) -> str:
        r = asked_by_program()
        found: str = true(self)
        return found if r is None else _type(r, found)

    own_text = owner.__repr__

    def text(self: Any) -> str:
        r = state._active
        found: str = own_text(self)
        return found if r is None else found.replace(f"'{r.type}'", "'cuda'", 1)  # its dimensions have no quotes

    patches.set(owner, "device_type", property(device_type, doc=owner.device_type.__doc__))
    patches.set(owner, "__repr__", text)


def _group(patches: Patches, owner: Any) -> None:
    own_name = owner.name

    def name(self: Any) -> str:
        r = asked_by_program()
        found: str = own_name(self)
        # Of a group of several libraries CUDA names NCCL, too.
        return "nccl" if r is not None and "nccl" in r.groups.get(self, "") else found

    patches.set(owner, "name", name)


def _local(redirection: Redirection, patches: Patches, owner: Any) -> None:
    """Let the hook of local SGD make a group for the ranks of each host, whose number it asks CUDA for."""
    import torch.distributed as dist

    ours = functools.partial(process_groups.new_subgroups, redirection)
    patches.set(sys.modules[owner.__module__], "dist", StandIn(dist, {"new_subgroups": ours}))


def _parallel(patches: Patches, owner: Any) -> None:
    own_init, own_check, own_norms = owner.__init__, owner._check_comm_hook, owner._passing_sync_batchnorm_handle

    def indices(self: Any) -> Any:
        r = asked_by_program()
        true, asked = self.__dict__["device_ids"], self.__dict__.get("_hal_device_ids")
        return true if r is None or r.hosts is None or not asked else [r.index(device) for device in asked]

    def put(self: Any, value: Any) -> None:
        self.__dict__["device_ids"] = value

    def output(self: Any) -> Any:
        r = asked_by_program()
        true, asked = self.__dict__["output_device"], self.__dict__.get("_hal_device_ids")
        if r is None or r.hosts is None or not asked:
            return true
        given = self.__dict__.get("_hal_output_device")
        return r.index(asked[0] if given is None else given)

    def put_output(self: Any, value: Any) -> None:
        self.__dict__["output_device"] = value

    @functools.wraps(own_init)
    def init(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any,
             **kwargs: Any) -> None:  # fmt: skip
        own_init(self, module, device_ids, output_device, *args, **kwargs)
        self.__dict__["_hal_device_ids"], self.__dict__["_hal_output_device"] = device_ids, output_device

    def check(self: Any, hook: Any) -> None:
        if state._active is not None and callable(hook):
            # torch asks by the hook's name whether there is an NCCL that sums bfloat16.
            original, hook = hook, lambda *args: original(*args)
            functools.update_wrapper(hook, original)
            hook.__name__ = "hook"
        own_check(self, hook)

    def norms(self: Any, module: Any) -> None:
        r = state._active
        if r is None or r.hosts is None:
            own_norms(self, module)

    del init.__wrapped__
    patches.set(owner, "__init__", init)
    patches.set(owner, "device_type", _told("device_type", _type))
    patches.set(owner, "device_ids", property(indices, put))
    patches.set(owner, "output_device", property(output, put_output))
    patches.set(owner, "_check_comm_hook", check)
    patches.set(owner, "_passing_sync_batchnorm_handle", norms)
