# SPDX-License-Identifier: Apache-2.0
"""Operators of the program's own: the kernel that it registers for CUDA serves the device.

torch dispatches to a kernel by the true device of what is given. On a CPU that stands for CUDA both sides have one
dispatch key: a kernel that the program registered for it, too, is called where every tensor is known to be on the host.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

door(
    "torch.library.Library.impl", verdict="emulated",
    note="kernels for CUDA are called for the device's tensors; those of torch's own operators are left alone",
)  # fmt: skip

Kernel = Callable[..., Any]

_OF_ALL = "CompositeExplicitAutograd"
"""The dispatch key of a kernel for every device that has none of its own."""


@dataclass
class _Kernels:
    """The kernels of one operator: for CUDA, and for the dispatch key that the device really has.

    With each is the library that registered it: a kernel ends with its library.
    """

    name: str
    cuda: tuple[Kernel, weakref.ref[Any]] | None = None
    own: tuple[Kernel, weakref.ref[Any]] | None = None

    def forget_ended(self) -> None:
        """Forget the kernels whose library is gone."""
        for key in ("cuda", "own"):
            kernel = getattr(self, key)
            library = None if kernel is None else kernel[1]()
            if library is None or library.m is None:
                setattr(self, key, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the kernel of the side on which the tensors are."""
        import torch

        r = state.active()
        if r is None and self.own is None:
            raise NotImplementedError(f"{self.name} has a kernel for CUDA only, and CUDA is not redirected any more")
        on_host = False
        if r is not None and r.hosts is not None:
            tensors = [thing for thing in (*args, *kwargs.values()) if isinstance(thing, torch.Tensor)]
            on_host = bool(tensors) and all(tensor in r.hosts for tensor in tensors)
        kernel = self.own if self.own is not None and (r is None or on_host) else self.cuda
        assert kernel is not None
        return kernel[0](*args, **kwargs)


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the registration of kernels."""
    import torch

    library: Any = torch.library.Library
    original = library.impl
    own_key: str = torch._C._dispatch_key_for_device(redirection.type)
    known: dict[str, _Kernels] = {}

    def impl(self: Any, op_name: Any, fn: Kernel, dispatch_key: str = "", **kwargs: Any) -> None:
        r, key = state.active(), dispatch_key or self.dispatch_key
        if r is None or key not in ("CUDA", own_key, _OF_ALL) or self.ns == "aten" or kwargs.get("with_keyset"):
            original(self, op_name, fn, dispatch_key, **kwargs)
            return
        name = f"{self.ns}::{self._resolve_op_name(op_name, 'impl').rpartition('::')[2]}"
        kernels = known.setdefault(name, _Kernels(name))
        kernels.forget_ended()
        setattr(kernels, "cuda" if key == "CUDA" else "own", (fn, weakref.ref(self)))
        if key == "CUDA":
            r.audit.count_nearest("torch.library.Library.impl", sys._getframe(1))
        if kernels.cuda is None or key == _OF_ALL:
            original(self, op_name, fn, dispatch_key, **kwargs)
            return
        if kernels.own is not None:
            kwargs["allow_override"] = True  # of one by the other, under the one key that both have
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            original(self, op_name, kernels, own_key, **kwargs)

    patches.set(library, "impl", impl)
