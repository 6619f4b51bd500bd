# SPDX-License-Identifier: Apache-2.0
"""Placing on a device what a training loop has: modules, optimisers, tensors and loaders."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

from hal.errors import ConfigError

if TYPE_CHECKING:
    import torch


def place(device_id: str, device: torch.device, things: tuple[Any, ...]) -> tuple[Any, ...]:
    """Place things on a device; see `Device.prepare`. Nothing is moved if it can be seen that something cannot be.

    What only moving can show (a module whose own `to` refuses, a device that is full) is an error that says how far it
    came. Nothing is moved back: that can fail as well, and would take away the parameters that an optimiser outside of
    this call may follow by now.

    Args:
        device_id: for messages.
        device: where to.
        things: modules, optimisers, batches, and iterables of batches.

    Raises:
        ConfigError: one is none of these; a module's parameters have no values or no shape yet; an optimiser's
            parameters are elsewhere; one refused to move.
    """
    coming = {parameter for thing in things if _kind(thing) == "module" for parameter in thing.parameters()}
    for thing in things:
        if _kind(thing) == "module":
            _check_module(device_id, device, thing)
        elif _kind(thing) == "optimizer":
            _check_parameters(device_id, device, thing, coming)
        else:
            _check_data(device_id, thing)

    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    placed = list(things)
    # Modules first: an optimiser follows the parameters that they have then.
    order = [index for kind in _KINDS for index, thing in enumerate(things) if _kind(thing) == kind]
    for step, index in enumerate(order):
        try:
            placed[index] = _placed(things[index], device, moved)
        except Exception as error:
            raise ConfigError(
                f"{device_id}: {_called(things, [index])} cannot be moved: {type(error).__name__}: {error}\n"
                f"  moved before: {_called(things, order[:step])}; not moved: {_called(things, order[step + 1 :])}; "
                "itself perhaps in part"
            ) from error
    return tuple(placed)


_KINDS = ("module", "optimizer", "data")


def _kind(thing: Any) -> str:
    import torch

    if isinstance(thing, torch.nn.Module):
        return "module"
    return "optimizer" if isinstance(thing, torch.optim.Optimizer) else "data"


def _called(things: tuple[Any, ...], indices: list[int]) -> str:
    return ", ".join(f"argument {index + 1} ({type(things[index]).__name__})" for index in sorted(indices)) or "none"


def _placed(thing: Any, device: torch.device, moved: dict[torch.nn.Parameter, torch.nn.Parameter]) -> Any:
    kind = _kind(thing)
    if kind == "module":
        _move_module(thing, device, moved)
    elif kind == "optimizer":
        _move_optimizer(thing, device, moved)
    else:
        return _placed_data(thing, device)
    return thing


# Modules and optimisers ------------------------------------------------------------------------------------------


def _check_module(device_id: str, device: torch.device, module: torch.nn.Module) -> None:
    from torch.nn.parameter import is_lazy

    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        what = f"{device_id}: {name} of this {type(module).__name__}"
        # torch would move it; but where a module gets new parameters, its own can no longer become what they are to be.
        if is_lazy(tensor):
            raise ConfigError(f"{what} has no shape yet", hint="one forward pass of the module before it is prepared")
        if tensor.device.type == "meta" and device.type != "meta":
            raise ConfigError(
                f"{what} is on the meta device and has no values",
                hint=f"module.to_empty(device={str(device)!r}) and its own initialisation, or "
                "module.load_state_dict(..., assign=True), before it is prepared",
            )


def _check_parameters(
    device_id: str, device: torch.device, optimizer: torch.optim.Optimizer, coming: set[torch.nn.Parameter]
) -> None:
    from torch.nn.parameter import is_lazy

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in coming and parameter.device != device:
                shape = "no shape yet" if is_lazy(parameter) else f"shape {tuple(parameter.shape)}"
                raise ConfigError(
                    f"{device_id}: the optimiser holds a parameter of {shape} on {parameter.device}, of none of the "
                    "modules here",
                    hint="prepare it together with its model: device.prepare(model, optimizer, loader)",
                )


def _move_module(
    module: torch.nn.Module, device: torch.device, moved: dict[torch.nn.Parameter, torch.nn.Parameter]
) -> None:
    """Move a module in place, and add to `moved` which parameter became which.

    On most devices a parameter stays the object that it is. On plug-in devices torch makes new ones, one for each
    place, so what was shared is shared again.
    """
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    module.to(device)
    for part, name, old in places:
        now = part._parameters[name]
        new = moved.setdefault(old, now)  # type: ignore[arg-type]  # it was no None before
        if new is not now:
            part._parameters[name] = new  # as `Module.to` does it: a module's own __setattr__ may refuse


def _move_optimizer(
    optimizer: torch.optim.Optimizer, device: torch.device, moved: dict[torch.nn.Parameter, torch.nn.Parameter]
) -> None:
    for group in optimizer.param_groups:
        # torch's own rule (`Optimizer.load_state_dict`): a step count stays on the host, unless the step is computed on
        # the device.
        step_too = bool(group.get("capturable") or group.get("fused"))
        for index, old in enumerate(group["params"]):
            parameter = group["params"][index] = moved.get(old, old)
            state = optimizer.state.pop(old, None)
            if state is not None:
                optimizer.state[parameter] = _moved_state(state, device, step_too)


def _moved_state(state: Any, device: torch.device, step_too: bool, key: object = None) -> Any:
    import torch

    if isinstance(state, torch.Tensor):
        return state if key == "step" and not step_too else state.to(device)
    if isinstance(state, dict):
        for inner, value in state.items():
            state[inner] = _moved_state(value, device, step_too, inner)
    elif type(state) in (list, tuple):
        return type(state)(_moved_state(value, device, step_too, key) for value in state)
    return state


# Batches and loaders ---------------------------------------------------------------------------------------------


def _is_batch(thing: Any) -> bool:
    """Whether a thing is one batch: a tensor, a dict, a tuple, or a list of tensors, as torch collates them."""
    import torch

    if isinstance(thing, list):
        return any(isinstance(item, torch.Tensor) for item in thing)
    return isinstance(thing, (Mapping, tuple)) or _moves_itself(thing)


def _moves_itself(thing: Any) -> bool:
    return callable(getattr(thing, "to", None))


def _is_array(thing: Any) -> bool:
    """Whether a thing is an array of numpy's, which lies in the host's memory and does not move."""
    numpy = sys.modules.get("numpy")  # whoever has such an array has imported it
    return numpy is not None and isinstance(thing, numpy.ndarray)


def _array(device_id: str) -> ConfigError:
    return ConfigError(
        f"{device_id}: an array of numpy's stays on the host", expected="tensors", hint="torch.as_tensor(array)"
    )


def _check_data(device_id: str, thing: Any) -> None:
    from torch.utils._pytree import tree_leaves

    is_batch = _is_batch(thing)
    # A list without tensors is a loader, whose batches lie in memory; a set is one, too.
    if is_batch or isinstance(thing, (list, set, frozenset, collections.deque)):
        leaves = tree_leaves(thing if is_batch else list(thing), is_leaf=_moves_itself)
        for leaf in leaves:
            if _kind(leaf) != "data":
                raise ConfigError(
                    f"{device_id}: a {type(leaf).__name__} inside a {type(thing).__name__}",
                    expected="modules and optimisers as arguments of their own",
                    hint="device.prepare(*objects), or a torch.nn.ModuleList",
                )
        moving = any(map(_moves_itself, leaves))
        if not moving and any(map(_is_array, leaves)):
            raise _array(device_id)
        if moving or not is_batch:
            return
        raise ConfigError(f"{device_id}: nothing in this {type(thing).__name__} can be placed", expected="tensors")
    if _is_array(thing):
        raise _array(device_id)
    if not isinstance(thing, Iterable) or isinstance(thing, (str, bytes)):
        raise ConfigError(
            f"{device_id}: cannot place a {type(thing).__name__}",
            expected="modules, optimisers, batches of tensors, or iterables of batches",
        )


def _placed_data(thing: Any, device: torch.device) -> Any:
    if _is_batch(thing):
        return move_batch(thing, device)
    return BatchMover(thing.loader if isinstance(thing, BatchMover) else thing, device)


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on the device.

    Dicts, lists and tuples are walked through; other objects that have a method `to` (a PackedSequence, a tokenizer's
    encoding) move themselves, and everything else stays as it is.
    """
    import torch
    from torch.utils._pytree import tree_map

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            # Asynchronous where the loader pinned its memory; torch copies synchronously otherwise.
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if _moves_itself(leaf) else leaf

    return tree_map(move, batch, is_leaf=_moves_itself)


@final
class BatchMover:
    """An iterable of batches whose tensors are moved to a device as they are fetched.

    Everything else about the wrapped loader (`len`, `dataset`, `sampler`, ...) stays reachable.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader = loader
        self.device = device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield move_batch(batch, self.device)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a TypeError is the loader's own answer

    def __getattr__(self, name: str) -> Any:
        # Special methods belong to the object itself: copying would otherwise copy the loader and lose the mover. While
        # it is being unpickled there is no loader yet.
        if name.startswith("__") or "loader" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)
