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
from hal.launch.surface.default_device import makes_on_host

if TYPE_CHECKING:
    import torch

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
    found |= {f"torch.{name}": getattr(torch, name) for name in (*LIKE, "normal", "from_numpy", "frombuffer")}
    return found


def _hashable(thing: object) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True


def maker(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the function that stands in for a maker of tensors."""
    from torch.compiler import is_compiling

    like = name.endswith("_like")

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        redirection = api._active
        if redirection is None:
            return original(*args, **kwargs)
        hosts, device = redirection.hosts, kwargs.get("device")
        if device is None:
            made = original(*args, **kwargs)
            if hosts is not None and not is_compiling() and _on_host(like, args, redirection):
                hosts.add(made)
            return made
        true = redirection.translate(device)
        if true is device:
            made = original(*args, **kwargs)
            if hosts is not None and not is_compiling() and redirection.is_host(device):
                hosts.add(made)
            return made
        kwargs["device"] = true
        if not is_compiling():
            redirection.audit.count(name, sys._getframe(1))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    functools.update_wrapper(make, original, updated=())
    del make.__wrapped__  # type: ignore[attr-defined]
    give_name(make, name)
    return make


def _on_host(like: bool, args: tuple[Any, ...], redirection: Redirection) -> bool:
    """Whether a tensor that was made without a device is on the host: its model is, or the default device is."""
    if like:
        return bool(args) and redirection.hosts is not None and args[0] in redirection.hosts
    return makes_on_host(redirection)
