# SPDX-License-Identifier: Apache-2.0
"""`with torch.device("cuda")` and `torch.set_default_device`: where tensors are made that name no device.

torch keeps the default as modes on a stack, the innermost counting. They keep the true device here, and a mark.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import api, door
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

door("torch.set_default_device")


def install(redirection: Redirection, patches: Patches) -> None:
    """Translate the device of every default."""
    from torch.utils._device import DeviceContext

    original: Any = DeviceContext.__init__

    def constructor(self: Any, device: Any) -> None:
        r = state.active()
        true = device if r is None else r.translate(device)
        original(self, true)
        self.on_device = true is not device
        if r is not None and self.on_device:
            frame = sys._getframe(1)
            name = "set_default_device" if frame.f_code.co_name == "set_default_device" else "device"
            r.audit.count_nearest(f"torch.{name}", frame)

    patches.set(DeviceContext, "__init__", constructor)


def default_context() -> Any:
    """Return torch's mode for the default device, or None where there is no default."""
    from torch._C import _get_function_stack_at, _len_torch_function_stack
    from torch.utils._device import DeviceContext

    for level in reversed(range(_len_torch_function_stack())):
        mode: Any = _get_function_stack_at(level)
        if isinstance(mode, DeviceContext):
            return mode
    return None


def makes_on_host(r: Redirection) -> bool:
    """Return whether a tensor that is made without a device is on the host."""
    context = default_context()
    return context is None or (context.device.type == r.type and not getattr(context, "on_device", False))


@api("torch.get_default_device", belief=True)
def get_default_device(r: Redirection) -> torch.device:
    """CUDA, where the program made it so."""
    import torch

    context = default_context()
    return r.present(context.device) if getattr(context, "on_device", False) else torch.get_default_device()


@api("torch.set_default_tensor_type")
def set_default_tensor_type(r: Redirection, t: Any) -> None:
    """CUDA's types set dtype and device."""
    import torch

    from hal.launch.surface.cuda.tensor_types import CudaTensorType

    if isinstance(t, CudaTensorType):
        t = f"torch.cuda.{t.__name__}"
    if isinstance(t, str) and t.startswith("torch.cuda."):
        t = t.replace("torch.cuda.", "torch.", 1)
        torch.set_default_device("cuda")
        r.default_type_on_device = True
    elif r.default_type_on_device:  # a type of the host's undoes one of CUDA's, and no default device
        torch.set_default_device(None)
        r.default_type_on_device = False
    torch.set_default_tensor_type(t)
