# SPDX-License-Identifier: Apache-2.0
"""Automatic mixed precision under its old and its new names.

`autocast` and `GradScaler` stay torch's own classes: only what their constructors are given is translated.
"""

from __future__ import annotations

import sys
from typing import Any

from hal.launch import api as state
from hal.launch.api import api, door
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

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
    from torch.compiler import is_compiling

    autocast_init, scaler_init = autocast.__init__, GradScaler.__init__

    def autocast_(self: Any, device_type: str, dtype: Any = None, enabled: bool = True,
                  cache_enabled: bool | None = None) -> None:  # fmt: skip
        r = state._active
        if r is not None and device_type == "cuda":
            if not is_compiling():
                r.audit.count_nearest("torch.amp.autocast", sys._getframe(1))
            device_type = r.type
            # The default is CUDA's own, or what the program set for CUDA; a CPU's would be bfloat16.
            dtype = torch.get_autocast_dtype("cuda") if dtype is None else dtype
        autocast_init(self, device_type, dtype, enabled, cache_enabled)

    def scaler(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        r = state._active
        if r is not None and device == "cuda":
            r.audit.count_nearest("torch.amp.GradScaler", sys._getframe(1))
            device = r.type
        scaler_init(self, device, *args, **kwargs)

    patches.set(autocast, "__init__", autocast_)
    patches.set(GradScaler, "__init__", scaler)


@api("torch.amp.custom_fwd")
def custom_fwd(r: Redirection, fwd: Any = None, *, device_type: str, cast_inputs: Any = None) -> Any:
    """For the device."""
    from torch.amp import custom_fwd as own

    return own(fwd, device_type=r.translate_type(device_type), cast_inputs=cast_inputs)


@api("torch.cuda.amp.custom_fwd")
def cuda_custom_fwd(r: Redirection, fwd: Any = None, **kwargs: Any) -> Any:
    """For the device."""
    return custom_fwd(r, fwd, device_type="cuda", **kwargs)


@api("torch.amp.custom_bwd")
def custom_bwd(r: Redirection, bwd: Any = None, *, device_type: str) -> Any:
    """For the device."""
    from torch.amp import custom_bwd as own

    return own(bwd, device_type=r.translate_type(device_type))


@api("torch.cuda.amp.custom_bwd")
def cuda_custom_bwd(r: Redirection, bwd: Any = None) -> Any:
    """For the device."""
    return custom_bwd(r, bwd, device_type="cuda")


@api("torch.is_autocast_enabled")
def is_autocast_enabled(r: Redirection, device_type: str = "cuda") -> bool:
    """For the device."""
    import torch

    return torch.is_autocast_enabled(r.translate_type(device_type))


@api("torch.set_autocast_enabled")
def set_autocast_enabled(r: Redirection, *args: Any) -> None:
    """For the device; the old form has no device type and means CUDA."""
    import torch

    device_type, enabled = args if len(args) == 2 else ("cuda", *args)
    torch.set_autocast_enabled(r.translate_type(device_type), enabled)


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
    if device_type == "cuda":
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
