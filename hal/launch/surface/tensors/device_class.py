# SPDX-License-Identifier: Apache-2.0
"""`torch.device(0)`: an index alone is a CUDA device.

torch takes an index for one of its accelerator, and a torch without one raises. Its class cannot be changed, and has
no subclasses: the program sees another, equal to it, that makes torch's own objects.
"""

from __future__ import annotations

import copyreg
import functools
import operator
import sys
from typing import TYPE_CHECKING, Any

from hal.launch.api import active, door
from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection, is_number
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

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> DeviceType:
        """Make the class; torch's has no subclasses, and neither has this one."""
        if bases:
            raise TypeError("type 'torch.device' is not an acceptable base type")
        return super().__new__(cls, name, bases, namespace)

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
        return subclass is cls or issubclass(subclass, cls.original)

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

    original = torch.device
    own = {name: value for name, value in vars(original).items() if name != "__new__"}  # `torch.device.__str__(d)`
    return DeviceType("device", (), {**own, "__module__": "torch", "__new__": _new, "original": original})


def _new(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return cls(*args, **kwargs)


_PICKLERS = tuple(f"{package}cloudpickle.cloudpickle" for package in ("", "joblib.externals.", "ray."))
"""Where cloudpickle is: it sends classes by value that it does not find under their names."""


def install(redirection: Redirection, patches: Patches) -> None:
    """Let cloudpickle send the class by name, and the compiler leave what it cannot make, once they are loaded."""
    for name in _PICKLERS:
        when_loaded(name, "_class_reduce", functools.partial(_by_name, patches, name))
    when_loaded("torch._dynamo.variables.user_defined", "UserDefinedClassVariable",
                functools.partial(_constants_only, patches))  # fmt: skip


def _by_name(patches: Patches, name: str, original: Any) -> None:
    def class_reduce(kind: Any) -> Any:
        return (_seen, ()) if isinstance(kind, DeviceType) else original(kind)

    patches.set(sys.modules[name], "_class_reduce", class_reduce)


def _constants_only(patches: Patches, variable: Any) -> None:
    """Let code be run that makes a device of a number which the compiler does not know, as it is with torch's class."""
    original = variable.call_function

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(self.value, DeviceType) and not all(
            given.is_python_constant() for given in (*args, *kwargs.values())
        ):
            from torch._dynamo.exc import Unsupported

            raise Unsupported("torch.device of a number that is not known while it is compiled")
        return original(self, tx, args, kwargs)

    patches.set(variable, "call_function", call_function)
