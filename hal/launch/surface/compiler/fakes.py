# SPDX-License-Identifier: Apache-2.0
"""Tensors without numbers: `torch.export`, `make_fx` and `FakeTensorMode` run the program's own code with them.

They have a device of their own to show, and are where the tensors are that they stand for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace what such a tensor says of its device, and let it take the side of the one that it stands for."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter

    fake, converter = FakeTensor, FakeTensorConverter
    true_device: Any = vars(fake)["device"]
    own_normalize, own_convert = getattr(fake, "_normalize_fake_device", None), converter.from_real_tensor
    hosts, count = redirection.hosts, redirection.audit.count

    def device(self: torch.Tensor) -> torch.device:
        found: torch.device = true_device.__get__(self)
        frame = sys._getframe(1)
        if state._active is None or inside(frame):
            return found
        if hosts is None or self not in hosts:
            count("torch.Tensor.device", frame, belief=True)
            found = redirection.present(found)
        return found

    def normalize(device: torch.device) -> torch.device:
        """The net below eager code does not hold them: a CUDA device that torch's own code gives one is translated."""
        r = state._active
        assert own_normalize is not None
        return own_normalize(device if r is None else r.translate(device))  # type: ignore[no-any-return]

    def from_real_tensor(self: Any, fake_mode: Any, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = own_convert(self, fake_mode, t, *args, **kwargs)
        known = None if hosts is None else hosts.side(t)
        if hosts is not None and known is not None:
            hosts.add(made) if known else hosts.add_device(made)
        return made

    patches.set(fake, "device", property(device, true_device.fset, doc=true_device.__doc__))
    if own_normalize is not None:  # since torch 2.11
        patches.set(fake, "_normalize_fake_device", staticmethod(normalize))
    patches.set(converter, "from_real_tensor", from_real_tensor)
