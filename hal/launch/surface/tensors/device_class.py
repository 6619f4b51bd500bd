# SPDX-License-Identifier: Apache-2.0
"""`torch.device(0)`: an index alone is a CUDA device.

torch takes an index for one of its accelerator, and a torch without one raises. Its class cannot be changed, and has
no subclasses: the program sees another, equal to it, that makes torch's own objects.
"""

from __future__ import annotations

import copyreg
import operator
import sys
from typing import TYPE_CHECKING, Any

from hal.launch.api import active, door
from hal.launch.redirection import is_number
from hal.launch.stand_ins import seen_module

if TYPE_CHECKING:
    import torch

door("torch.device")


class DeviceType(type):
    """The metaclass of what stands in for `torch.device`: all but making one of an index is left to torch's class.

    It is equal to torch's, since tables and annotations are compared so; `type(device) is torch.device` alone tells
    them apart.
    """

    original: type[torch.device]

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        """Make a device, as torch's class does."""
        r = active()
        given = args if args or len(kwargs) != 1 else (kwargs.get("device"),)
        if r is not None and len(given) == 1 and len(args) + len(kwargs) == 1 and is_number(given[0]):
            r.audit.count_outside("torch.device", sys._getframe(1))
            return cls.original("cuda", operator.index(given[0]))
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


def _seen() -> Any:
    """Return the class that this process sees; a pickled one is a call of this."""
    return seen_module("torch").device


copyreg.pickle(DeviceType, lambda cls: (_seen, ()))


def device_class() -> DeviceType:
    """Return the class that the program sees as `torch.device`."""
    import torch

    return DeviceType("device", (), {"__module__": "torch", "__doc__": torch.device.__doc__, "original": torch.device})
