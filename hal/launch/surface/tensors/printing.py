# SPDX-License-Identifier: Apache-2.0
"""The text of a tensor, which ends in `device='cuda:0'` for one on the device, as CUDA's does.

torch's printer is one of its own modules, and sees the true device. It hands what it puts behind the numbers to one
function, where the device that the program sees takes the place of the other.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

door("torch.Tensor.__repr__")


class _Printed(threading.local):
    """What this thread prints: the tensor's device as the program sees it, or nothing."""

    device: torch.device | None = None


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace two functions of torch's printer."""
    import torch

    printer: Any = torch._tensor_str
    text, add_suffixes = printer._str_intern, printer._add_suffixes
    true_device = torch._C.TensorBase.device.__get__
    printed = _Printed()

    def seen(tensor: torch.Tensor) -> torch.device | None:
        r = state.active()
        if r is None or (r.hosts is not None and tensor in r.hosts):
            return None
        true = true_device(tensor)
        return r.present(true) if true.type == r.type else None

    def with_device(tensor: Any, **kwargs: Any) -> Any:
        outer, printed.device = printed.device, seen(tensor)
        try:
            return text(tensor, **kwargs)
        finally:
            printed.device = outer

    def suffixed(numbers: str, suffixes: list[str], *args: Any, **kwargs: Any) -> Any:
        if printed.device is not None:
            others = (suffix for suffix in suffixes if not suffix.startswith("device="))
            suffixes = [f"device='{printed.device}'", *others]
        return add_suffixes(numbers, suffixes, *args, **kwargs)

    patches.set(printer, "_str_intern", with_device)
    patches.set(printer, "_add_suffixes", suffixed)
