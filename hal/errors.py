# SPDX-License-Identifier: Apache-2.0
"""Every error that hal raises, in one tree::

    HalError
    ├── ConfigError (ValueError)            an argument or a setting is wrong, or two contradict each other
    ├── ShapeError (ValueError)             a tensor has the wrong shape, dtype or device, or an index lies outside
    ├── PluginError
    │   ├── DuplicateBackend                two plug-ins claim one name
    │   └── IncompatiblePlugin              written for another major version of the plug-in API
    ├── DeviceError                         carries `.device`
    │   ├── UnknownDevice (LookupError)     no registered backend answers to that name
    │   ├── Absent                          no such hardware here: skip
    │   ├── Broken                          installed, but does not work: report, and fail when asked for
    │   ├── DeviceClosed                    used after close()
    │   ├── DeviceConflict                  a process-wide switch is already held at another value
    │   └── OutOfMemoryError (MemoryError)  carries requested bytes and statistics
    ├── Unsupported (NotImplementedError)   carries `.device` and `.what`
    │   ├── UnsupportedDtype
    │   ├── UnsupportedPrecision
    │   └── UnsupportedOperation
    └── CollectiveError                     carries `.operation`, `.rank`
        └── CollectiveTimeout (TimeoutError)

What the caller's own code raises passes through our context managers unchanged, except what they are there to
translate. Every error can be pickled, and so comes out of a worker process as what it was.

A message says what happened, where, what was expected and what to try. The vendor's own exception, if there
is one, is the `__cause__`. `Absent` and `Broken` are different on purpose: a caller that skips missing
hardware must never skip a dead driver with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hal.memory_stats import MemoryStats


class HalError(Exception):
    """Base of every error that hal raises.

    Args:
        message: what happened and where.
        expected: what would have been right.
        hint: what to try.
    """

    def __init__(self, message: str, *, expected: str = "", hint: str = "") -> None:
        self.message = message
        self.expected = expected
        self.hint = hint
        parts = [message]
        if expected:
            parts.append(f"  expected: {expected}")
        if hint:
            parts.append(f"  try: {hint}")
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls the class with the finished message alone, which the keywords here refuse.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[HalError], args: tuple[Any, ...], state: dict[str, Any]) -> HalError:
    # Made without its constructor, which is only safe through the built-in class that gives it its layout.
    builtin: Any = kind
    while builtin.__module__ != "builtins":
        builtin = builtin.__base__
    error: HalError = builtin.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(HalError, ValueError):
    """An argument or a setting is of the wrong type, out of range or unreadable, or two contradict each other."""


class ShapeError(HalError, ValueError):
    """A tensor has the wrong shape or dtype or lies on another device, or an index lies outside its range."""


class PluginError(HalError):
    """A plug-in is not usable."""


class DuplicateBackend(PluginError):
    """Two installed distributions register a backend under one name; both are refused."""


class IncompatiblePlugin(PluginError):
    """A plug-in was written for another major version of `hal.backend.PLUGIN_API`."""


class DeviceError(HalError):
    """Something is wrong with one device, named by `device`."""

    def __init__(self, message: str, *, device: str, expected: str = "", hint: str = "") -> None:
        super().__init__(f"{device}: {message}", expected=expected, hint=hint)
        self.device = device
        self.reason = message


class UnknownDevice(DeviceError, LookupError):
    """No registered backend answers to this name."""


class Absent(DeviceError):
    """There is no such hardware here. A caller may skip; nothing is wrong."""


class Broken(DeviceError):
    """The backend is installed, or its hardware is present, and it does not work. Never skip this silently."""


class DeviceClosed(DeviceError):
    """The device was used after `close()`."""


class DeviceConflict(DeviceError):
    """A process-wide switch is held at another value by another open device."""


class OutOfMemoryError(DeviceError, MemoryError):
    """The device cannot give the requested memory.

    Attributes:
        requested: bytes asked for, or None where the vendor does not say.
        stats: the device's memory statistics when the error was raised, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        device: str,
        requested: int | None = None,
        stats: MemoryStats | None = None,
        hint: str = "a smaller batch, activation checkpointing, or memory.empty_cache()",
    ) -> None:
        super().__init__(message, device=device, hint=hint)
        self.requested = requested
        self.stats = stats


class Unsupported(HalError, NotImplementedError):
    """The device cannot do this, and says why."""

    def __init__(self, message: str, *, device: str, what: str, expected: str = "", hint: str = "") -> None:
        super().__init__(f"{device}: {message}", expected=expected, hint=hint)
        self.device = device
        self.what = what
        self.reason = message


class UnsupportedDtype(Unsupported):
    """The device cannot store or compute in this dtype."""


class UnsupportedPrecision(Unsupported):
    """The device does not compute in this precision mode, whatever its switches read back."""


class UnsupportedOperation(Unsupported):
    """The device has no such operation."""


class CollectiveError(HalError):
    """A collective failed.

    Attributes:
        operation: the collective, such as `all_reduce`.
        rank: this process's rank, or None before there is a group.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str,
        rank: int | None = None,
        expected: str = "",
        hint: str = "",
    ) -> None:
        where = operation if rank is None else f"{operation} on rank {rank}"
        super().__init__(f"{where}: {message}", expected=expected, hint=hint)
        self.operation = operation
        self.rank = rank


class CollectiveTimeout(CollectiveError, TimeoutError):
    """A collective did not complete in time."""


def described(error: BaseException) -> str:
    """Return the type and the text of somebody else's exception; its text may raise, and then the type has to do."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception as inner:  # noqa: BLE001
        return f"{name}, whose text raised {type(inner).__name__}"
