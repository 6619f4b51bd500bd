# SPDX-License-Identifier: Apache-2.0
"""torch's functions that make tensors: a device argument is translated, and what was made without one is on the host.

Which functions these are torch says itself (`torch.utils._device`), those that are `like` a tensor apart.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.launch import api
from hal.launch.named import give_name
from hal.launch.redirection import Redirection
from hal.launch.surface.tensors.default_device import makes_on_host

if TYPE_CHECKING:
    import torch

    from hal.launch.host import HostTensors

LIKE = ("empty_like", "ones_like", "zeros_like", "full_like", "rand_like", "randn_like", "randint_like")


def makers() -> dict[str, Callable[..., Any]]:
    """Return torch's makers of tensors by name, such as `torch.fft.fftfreq`."""
    import torch
    from torch.utils._device import _device_constructors

    constructors = set(_device_constructors())
    found = {}
    for module in (torch, torch.fft, torch.nested, torch.signal.windows):
        for name, function in vars(module).items():
            windows = module is torch.signal.windows and name in module.__all__
            if callable(function) and _hashable(function) and (function in constructors or windows):
                found[f"{module.__name__}.{name}"] = function
    found |= {f"torch.{name}": getattr(torch, name) for name in (*LIKE, "normal")}
    found["torch.nested.as_nested_tensor"] = torch.nested.as_nested_tensor
    found |= {name: getattr(torch, name.removeprefix("torch.")) for name in _OF_MEMORY}
    return found


_OF_MEMORY = ("torch.from_numpy", "torch.frombuffer")
"""These take no device, and are on the host whatever the default is."""


def _hashable(thing: object) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True


def maker(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the function that stands in for a maker of tensors."""
    make = _of_memory(original) if name in _OF_MEMORY else _maker(name, original)
    functools.update_wrapper(make, original, updated=())
    del make.__wrapped__  # type: ignore[attr-defined]
    give_name(make, name)
    return make


def _of_memory(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from torch.compiler import is_dynamo_compiling

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:  # a step of training may call it for each of its samples
        made, redirection = original(*args, **kwargs), api._active
        if redirection is None or redirection.hosts is None or is_dynamo_compiling():
            return made
        return redirection.hosts.add(made)

    return make


def _maker(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    import torch
    from torch.compiler import is_dynamo_compiling

    like = name.endswith("_like")
    takes = name in ("torch.tensor", "torch.as_tensor", "torch.asarray")
    modes = torch._C._len_torch_function_stack

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        redirection = api._active
        if redirection is None:
            return original(*args, **kwargs)
        hosts, device = redirection.hosts, kwargs.get("device")
        true = device if device is None else redirection.translate(device)
        pins = kwargs.get("pin_memory")
        if pins:
            kwargs["pin_memory"] = pinned(redirection, device)
        if true is not device:
            kwargs["device"] = true
            if not is_dynamo_compiling():
                redirection.audit.count(name, sys._getframe(1))
        made = original(*args, **kwargs)
        if hosts is None or is_dynamo_compiling():
            return made
        if pins:
            return hosts.add_pinned(made)
        if true is not device:
            return _taken(args, made, hosts) if takes else hosts.add_device(made)
        if kwargs.get("out") is not None:  # which stays where it is
            return made
        if device is None and takes and modes() and not makes_on_host(redirection):
            return _taken(args, made, hosts)  # by the default device
        if device is None:
            plain = not (like or takes or modes())  # most are: no model, and nobody set a default
            host = plain or _on_host(like, takes, args, redirection)
        else:
            host = True if redirection.is_host(device) else None
        return made if host is None else hosts.add(made) if host else hosts.add_device(made)

    return make


def pinned(redirection: Redirection, device: Any) -> bool:
    """Return what torch is to be told where the program wants memory that is pinned.

    Raises:
        RuntimeError: of a CUDA device, as CUDA raises it.
    """
    if redirection.translate(device) is not device:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    # On a CPU the device works on the host's memory: there is nothing to lock.
    return redirection.hosts is None


def _taken(args: tuple[Any, ...], made: torch.Tensor, hosts: HostTensors) -> torch.Tensor:
    """Return a tensor on the device, of what may lie on the host: a copy of it, if torch has made none."""
    import torch

    given = args[0] if args else None
    if isinstance(given, torch.Tensor):
        shared = made is given and hosts.side(given) is not False
    else:  # an array shares its memory; lists and numbers have none
        shared = hasattr(given, "__array_interface__") or hasattr(given, "__dlpack__") or _is_buffer(given)
    return hosts.add_device(made.clone() if shared else made)


def _is_buffer(thing: object) -> bool:
    try:
        memoryview(thing)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _on_host(like: bool, takes: bool, args: tuple[Any, ...], redirection: Redirection) -> bool | None:
    """Whether a tensor that was made without a device is on the host: its model is, or the default device is."""
    import torch

    if like or (takes and args and isinstance(args[0], torch.Tensor)):
        model = args[0] if args else None
        return redirection.hosts.side(model) if redirection.hosts is not None and model is not None else None
    return makes_on_host(redirection)
