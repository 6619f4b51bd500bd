# SPDX-License-Identifier: Apache-2.0
"""Where torch's own code moves between host and device: on a CPU it sees no difference, and would copy nothing.

A state that is offloaded to the host would follow the training, and what the training moves to the device would change
what it was moved from. Each of these functions is private to torch; one that a version of torch has not is left out.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from hal.launch import api as state
from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

Answer = Callable[[Redirection, "inspect.BoundArguments", Any], Any]
"""Makes of a call and of what torch answered what CUDA would have answered."""


def install(redirection: Redirection, patches: Patches) -> None:
    """Let these functions copy, once somebody loads them."""
    if redirection.hosts is None:
        return
    for module, owner, name, answer in (
        ("torch.optim.optimizer", "Optimizer", "_process_value_according_to_param_policy", _state_of_an_optimizer),
        ("torch.distributed._state_dict_utils", "", "_iterate_state_dict", _offloaded),
        ("torch.distributed.utils", "", "_recursive_to", _inputs),
        ("torch.nn.parallel.distributed", "DistributedDataParallel", "_pre_forward", _inputs_of_replicas),
        ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState", "_root_pre_forward", _inputs_of_a_root),
        ("torch.distributed.fsdp._init_utils", "", "_move_states_to_device", _states),
        ("torch.distributed.fsdp._fully_shard._fsdp_init", "", "_move_states_to_device", _states),
        ("torch.distributed.fsdp._state_dict_utils", "", "_common_unshard_post_state_dict_hook", _checkpoint),
    ):
        when_loaded(module, owner or name, functools.partial(_answered, patches, module, name, answer))
    when_loaded("torch.distributed.fsdp._flat_param", "FlatParamHandle", functools.partial(_gathered, patches))


def _gathered(patches: Patches, owner: Any) -> None:
    """Copy the whole parameters that a sharded model offloads: it frees what they were gathered into at once."""
    original = owner.flat_param_to

    def flat_param_to(self: Any, *args: Any, **kwargs: Any) -> None:
        r = state.active()
        device = args[0] if args else kwargs.get("device")
        if r is not None and r.hosts is not None and r.is_host(device) and not self.is_sharded(self.flat_param):
            whole = self.flat_param.data
            self.flat_param.data = r.hosts.moved(whole, whole, True)
        original(self, *args, **kwargs)

    patches.set(owner, "flat_param_to", flat_param_to)


def _answered(patches: Patches, module: str, name: str, answer: Answer, found: Any) -> None:
    owner = found if isinstance(found, type) else sys.modules[module]
    own = vars(owner).get(name)
    if own is None:
        return
    function = own.__func__ if isinstance(own, staticmethod) else own
    form = inspect.signature(function)
    from torch.compiler import is_dynamo_compiling

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        r = state.active()
        return result if r is None or is_dynamo_compiling() else answer(r, form.bind(*args, **kwargs), result)

    patches.set(owner, name, staticmethod(call) if isinstance(own, staticmethod) else call)


def _state_of_an_optimizer(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    # torch moves all of a state to where its parameter is, but for a count of steps that it leaves where it was.
    param, value = call.arguments["param"], call.arguments["value"]
    if call.arguments.get("key") == "step" and result is value:
        return result
    assert r.hosts is not None
    return r.hosts.moved(value, result, param in r.hosts)


def _offloaded(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    import torch

    given = call.arguments
    if r.hosts is None or not isinstance(result, torch.Tensor):
        return result
    if not given.get("cpu_offload") or given.get("companion_obj") is not None:
        return result
    return r.hosts.moved(result, result, True)


def _inputs(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    return to_device(r, result)


def _inputs_of_replicas(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    return to_device(r, result) if on_device(r, call.arguments["self"].module) else result


def _inputs_of_a_root(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    return to_device(r, result) if call.arguments["self"]._is_root else result


def on_device(r: Redirection, module: Any) -> bool:
    """Return whether a module's parameters are on the device, to which its inputs are moved then."""
    first = next(module.parameters(), None)
    return r.hosts is not None and first is not None and first not in r.hosts


def to_device(r: Redirection, inputs: Any) -> Any:
    """Return what a wrapped module is called with, with copies on the device of all that is known to be on the host."""
    import torch
    from torch.utils._pytree import tree_map_only

    hosts = r.hosts
    if hosts is None:
        return inputs

    def moved(given: torch.Tensor) -> torch.Tensor:
        return hosts.moved(given, given, False) if given in hosts else given

    return tree_map_only(torch.Tensor, moved, inputs)


def _states(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    import torch

    params, buffers, target = call.args
    assert r.hosts is not None
    if target is None or target.type != r.type:
        return result
    with torch.no_grad():
        for tensor in (*params, *buffers):
            if tensor in r.hosts:
                tensor.data = r.hosts.moved(tensor.data, tensor.data, False)
            else:
                r.hosts.add_device(tensor)
    return result


def _checkpoint(r: Redirection, call: inspect.BoundArguments, result: Any) -> Any:
    # Of a sharded model: its parameters are copies by now, its buffers are not, since torch sees them on the host.
    import torch
    from torch.distributed.fsdp import _state_dict_utils as own
    from torch.distributed.fsdp._common_utils import clean_tensor_name

    model, prefix = call.arguments["fsdp_state"], call.arguments["prefix"]
    if r.hosts is None or not model._state_dict_config.offload_to_cpu:
        return result
    for name, _, _ in own._param_name_infos(call.arguments["module"], model):
        tensor = result.get(prefix + name)
        if type(tensor) is torch.Tensor:
            r.hosts.add(tensor)
    for key in model._buffer_names:
        name = prefix + clean_tensor_name(key)
        if type(tensor := result.get(name)) is torch.Tensor:
            result[name] = r.hosts.moved(tensor, tensor, True)
    return result
