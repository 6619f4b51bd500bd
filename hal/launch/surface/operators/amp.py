# SPDX-License-Identifier: Apache-2.0
"""Automatic mixed precision under its old and its new names.

`autocast` and `GradScaler` stay torch's own classes: only what their constructors are given is translated. On a CPU
CUDA's own flag and dtype of autocast say, besides the CPU's, whether CUDA's rules are in force; see `autocast`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hal.launch import api as state
from hal.launch.api import api, door
from hal.launch.awaited import when_loaded
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.surface.operators import autocast as rules

door(
    "torch.autocast", "torch.amp.autocast", "torch.amp.autocast_mode.autocast", "torch.cuda.amp.autocast",
    "torch.cuda.amp.autocast_mode.autocast", "torch.amp.GradScaler", "torch.amp.grad_scaler.GradScaler",
    "torch.cuda.amp.GradScaler", "torch.cuda.amp.grad_scaler.GradScaler", note="in float16 by default, as on CUDA",
)  # fmt: skip


def install(redirection: Redirection, patches: Patches) -> None:
    """Translate what the constructors are given."""
    import torch
    from torch.amp.autocast_mode import autocast
    from torch.amp.grad_scaler import GradScaler
    from torch.compiler import is_dynamo_compiling

    autocast_init, scaler_init = autocast.__init__, GradScaler.__init__
    own_enter: Any = autocast.__enter__
    own_exit: Any = autocast.__exit__
    rules.install(redirection, patches)
    patches.on_undo(_state_as_it_is(redirection.type))
    if redirection.hosts is not None:
        # The type of device whose autocast a checkpoint remembers where its tensors are on a CPU.
        when_loaded("torch.utils.checkpoint", "DefaultDeviceType",
                    lambda owner: patches.set(owner, "_default_device_type", "cuda"))  # fmt: skip

    def autocast_(self: Any, device_type: str, dtype: Any = None, enabled: bool = True,
                  cache_enabled: bool | None = None) -> None:  # fmt: skip
        r = state._active
        if r is not None and r.hosts is not None:
            # What torch enters for itself on the CPU, such as a checkpoint that computes again, is in addition.
            by_torch = type(self) is autocast and inside(sys._getframe(1))
            self._hal_cuda = True if device_type == "cuda" else None if by_torch or device_type != "cpu" else False
        if r is not None and device_type == "cuda":
            if not is_dynamo_compiling():
                r.audit.count_nearest("torch.amp.autocast", sys._getframe(1))
            device_type = r.type
            # The default is CUDA's own, or what the program set for CUDA; a CPU's would be bfloat16.
            dtype = torch.get_autocast_dtype("cuda") if dtype is None else dtype
        if cuda_only := self.__dict__.get("_hal_cuda") and dtype is torch.float32:
            dtype = torch.bfloat16  # a CPU's autocast takes float32 for a mistake, and turns itself off
        autocast_init(self, device_type, dtype, enabled, cache_enabled)
        if cuda_only:
            self.fast_dtype = torch.float32

    def enter(self: Any) -> Any:
        found = own_enter(self)
        cuda = getattr(self, "_hal_cuda", None)
        if cuda is not None:
            self._hal_before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            torch.set_autocast_enabled("cuda", cuda and self._enabled)
            if cuda:
                torch.set_autocast_dtype("cuda", self.fast_dtype)
        return found

    def leave(self: Any, *error: Any) -> Any:
        before = getattr(self, "_hal_before", None)
        if before is not None:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
        return own_exit(self, *error)

    def scaler(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        r = state._active
        if r is not None and device == "cuda":
            r.audit.count_nearest("torch.amp.GradScaler", sys._getframe(1))
            device = r.type
        scaler_init(self, device, *args, **kwargs)

    patches.set(autocast, "__init__", autocast_)
    patches.set(autocast, "__enter__", enter)
    patches.set(autocast, "__exit__", leave)
    patches.set(GradScaler, "__init__", scaler)


def _state_as_it_is(device_type: str) -> Callable[[], None]:
    """Return what puts autocast's state back: a program may set it, and may release inside of an autocast."""
    import torch

    types = ("cuda", device_type)
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types]

    def put_back() -> None:
        for kind, enabled, dtype in before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)

    return put_back


@api("torch.amp.custom_fwd")
def custom_fwd(r: Redirection, fwd: Any = None, *, device_type: str, cast_inputs: Any = None) -> Any:
    """For the device."""
    from torch.amp import custom_fwd as own

    return own(fwd, device_type=r.translate_type(device_type), cast_inputs=cast_inputs)


@api("torch.cuda.amp.custom_fwd", "torch.cuda.amp.autocast_mode.custom_fwd")
def cuda_custom_fwd(r: Redirection, fwd: Any = None, **kwargs: Any) -> Any:
    """For the device."""
    return custom_fwd(r, fwd, device_type="cuda", **kwargs)


@api("torch.amp.custom_bwd")
def custom_bwd(r: Redirection, bwd: Any = None, *, device_type: str) -> Any:
    """For the device."""
    from torch.amp import custom_bwd as own

    # On a CPU torch enters the backward's autocast by the name that it is given: CUDA's, for CUDA's rules.
    return own(bwd, device_type=device_type if r.hosts is not None else r.translate_type(device_type))


@api("torch.cuda.amp.custom_bwd", "torch.cuda.amp.autocast_mode.custom_bwd")
def cuda_custom_bwd(r: Redirection, bwd: Any = None) -> Any:
    """For the device."""
    return custom_bwd(r, bwd, device_type="cuda")


@api("torch.is_autocast_enabled")
def is_autocast_enabled(r: Redirection, device_type: str = "cuda") -> bool:
    """For the device."""
    import torch

    if r.hosts is not None and device_type in ("cuda", "cpu"):
        # The CPU's flag says whether there is autocast at all, and CUDA's whose it is.
        whose = torch.is_autocast_enabled("cuda") == (device_type == "cuda")
        return whose and torch.is_autocast_enabled("cpu")
    return torch.is_autocast_enabled(r.translate_type(device_type))


@api("torch.set_autocast_enabled")
def set_autocast_enabled(r: Redirection, *args: Any) -> None:
    """For the device; the old form has no device type and means CUDA."""
    import torch

    device_type, enabled = args if len(args) == 2 else ("cuda", *args)
    torch.set_autocast_enabled(r.translate_type(device_type), enabled)
    if r.hosts is not None and device_type in ("cuda", "cpu"):
        torch.set_autocast_enabled("cuda", device_type == "cuda" and enabled)
        if device_type == "cuda" and enabled:
            torch.set_autocast_dtype("cpu", torch.get_autocast_dtype("cuda"))


@api("torch.get_autocast_dtype")
def get_autocast_dtype(r: Redirection, device_type: str) -> Any:
    """The dtype in force on the device inside autocast, and CUDA's default outside."""
    import torch

    true = r.translate_type(device_type)
    return torch.get_autocast_dtype(true if torch.is_autocast_enabled(true) else device_type)


@api("torch.set_autocast_dtype")
def set_autocast_dtype(r: Redirection, device_type: str, dtype: Any) -> None:
    """For CUDA, as what `autocast("cuda")` takes, and for the device."""
    import torch

    torch.set_autocast_dtype(device_type, dtype)
    # Of a CPU only while CUDA's autocast is in force there: its own is another one.
    if device_type == "cuda" and (r.hosts is None or torch.is_autocast_enabled("cuda")):
        torch.set_autocast_dtype(r.type, dtype)


@api("torch.get_autocast_gpu_dtype")
def get_autocast_gpu_dtype(r: Redirection) -> Any:
    """The old name."""
    return get_autocast_dtype(r, "cuda")


@api("torch.set_autocast_gpu_dtype")
def set_autocast_gpu_dtype(r: Redirection, dtype: Any) -> None:
    """The old name."""
    set_autocast_dtype(r, "cuda", dtype)


@api("torch.amp.is_autocast_available", "torch.amp.autocast_mode.is_autocast_available", belief=True)
def is_autocast_available(r: Redirection, device_type: str) -> bool:
    """For the device."""
    import torch

    return torch.amp.is_autocast_available(r.translate_type(device_type))
