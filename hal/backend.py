# SPDX-License-Identifier: Apache-2.0
"""What a plug-in implements: one `Backend` object, named by an entry point in the group `hal.backends`.

Listing is cheap and opening is costly. `discover()` must not import a vendor package, must not initialise a
device, and leaves what it cannot know cheaply as None. `open()` may do all of that.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from hal.allocator_plan import AllocatorPlan
    from hal.changes import Changes
    from hal.facets import Facets

PLUGIN_API = (1, 0)
"""Version of this interface. Another major number is refused; minor numbers only add."""


@dataclass(frozen=True)
class DeviceInfo:
    """Facts about one device, known without opening it. What is not known is None.

    A fact of another type raises TypeError here, in the plug-in that made it up, and not where somebody reads it.

    Attributes:
        id: `backend:index`, or only `backend` where there can be one; stable for this process and machine.
        backend: name of the backend.
        vendor: who makes it.
        name: product name, as the driver gives it.
        arch: architecture in the vendor's own term, such as `sm_90` or `gfx942`.
        total_memory: bytes.
        torch_device: what `torch.device()` takes, such as `cuda:0`.
        simulated: True if the arithmetic is a model of hardware that is not there.
        count: devices that this one stands for; more than one only where they are simulated.
        evidence: what the backend looked at, one finding each.
    """

    id: str
    backend: str
    vendor: str
    name: str | None
    arch: str | None
    total_memory: int | None
    torch_device: str
    simulated: bool = False
    count: int = 1
    evidence: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("id", "backend", "vendor", "torch_device"):
            _must(isinstance(getattr(self, field), str), self, field, "a str")
        for field in ("name", "arch"):
            _must(isinstance(getattr(self, field), (str, type(None))), self, field, "a str or None")
        # Not isinstance: True is an int, and so are the numbers of numpy, which JSON does not take.
        _must(type(self.total_memory) in (int, type(None)), self, "total_memory", "an int, in bytes, or None")
        _must(type(self.simulated) is bool, self, "simulated", "a bool")
        _must(type(self.count) is int and self.count >= 1, self, "count", "an int of at least 1")
        _must(_is_tuple_of(self.evidence, str), self, "evidence", "a tuple of str")

    def as_json(self) -> dict[str, object]:
        """Return the facts as plain JSON values."""
        return {**self.__dict__, "evidence": list(self.evidence)}


class Specificity(IntEnum):
    """How closely a claim fits. Several chips answer to one torch device type; the most specific claim wins."""

    TORCH_TYPE = 0  # any device that torch addresses under this type
    PLATFORM = 10  # the software platform was recognised: version string, driver, device file
    PRODUCT = 20  # this product was recognised: name, SDK


@dataclass(frozen=True)
class Claim:
    """A backend's claim to one device. Raises TypeError as `DeviceInfo` does."""

    info: DeviceInfo
    specificity: Specificity = Specificity.PLATFORM

    def __post_init__(self) -> None:
        _must(isinstance(self.info, DeviceInfo), self, "info", "a DeviceInfo")
        _must(isinstance(self.specificity, Specificity), self, "specificity", "a Specificity")


@dataclass(frozen=True)
class Discovery:
    """What `discover()` found. Raises TypeError as `DeviceInfo` does.

    Attributes:
        claims: one for each device; may be more than will open.
        left: devices that were seen and left to another backend, each with the reason.
    """

    claims: tuple[Claim, ...]
    left: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _must(_is_tuple_of(self.claims, Claim), self, "claims", "a tuple of Claim")
        _must(_is_tuple_of(self.left, str), self, "left", "a tuple of str")


def _must(holds: bool, owner: object, field: str, expected: str) -> None:
    if not holds:
        value = getattr(owner, field)
        raise TypeError(
            f"{type(owner).__name__}.{field} is {value!r}, of type {type(value).__name__}; expected: {expected}"
        )


def _is_tuple_of(value: object, kind: type) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def advice_of(backend: Backend) -> tuple[str, ...]:
    """Return what `Backend.advice` says. Raises TypeError, as `DeviceInfo` does, if that is no sequence of str."""
    advice = backend.advice()
    if isinstance(advice, str) or not (isinstance(advice, Sequence) and all(isinstance(a, str) for a in advice)):
        raise TypeError(f"advice() returned {advice!r}; expected: a sequence of str")
    return tuple(advice)


class Backend(abc.ABC):
    """One kind of device. Implement `discover` and `open`; everything else has a default.

    A torch device type needs less: derive from `hal.torch_backend.TorchBackend`.
    """

    plugin_api: ClassVar[tuple[int, int]]
    """Copy the literal value of `PLUGIN_API` that you wrote against; never refer to the constant itself."""
    name: ClassVar[str]
    """Short lower-case key, the same as the entry point's; hal/backend_name.py has the rule."""
    vendor: ClassVar[str]

    @abc.abstractmethod
    def discover(self) -> Discovery:
        """Find devices, cheaply: no vendor package is imported and no device is initialised.

        Raises:
            Absent: no such hardware or software here, with the reason.
            Broken: present, but known not to work.
        """

    @abc.abstractmethod
    def open(self, info: DeviceInfo, changes: Changes) -> Facets:
        """Open one device that `discover` listed. Called at most once for each open `Device`.

        Args:
            info: one of the listed devices.
            changes: ledger through which every change to the process must go, so that it can be shown and
                undone.

        Raises:
            Absent: it is gone, or was never there.
            Broken: it does not work. Any other exception is reported as Broken with this as the cause.
        """

    def variant(self, name: str) -> DeviceInfo | None:
        """Return a device that is not listed, such as one with settings in its name; None: there is none.

        Args:
            name: what follows the backend's name and a colon.

        Raises:
            ConfigError: the name is one of such a device, and its settings cannot be read.
        """
        return None

    def prepare_import(self, changes: Changes) -> None:
        """Called before torch is first imported for this backend; set environment variables here."""

    def allocator_environment(self, plan: AllocatorPlan, environ: Mapping[str, str]) -> Mapping[str, str]:
        """Translate an allocator plan into environment variables, merged with what the user set.

        Raises:
            ConfigError: the plan contradicts `environ`, or has a setting that this allocator lacks.
        """
        from hal.errors import ConfigError

        if plan.settings():
            raise ConfigError(
                f"backend {self.name!r} has no configurable allocator",
                expected="an empty AllocatorPlan",
                hint="drop the allocator settings for this device",
            )
        return {}

    def versions(self) -> Mapping[str, str | None]:
        """Versions that matter when results are compared: driver, runtime, libraries. Unknown is None."""
        return {}

    def advice(self) -> Sequence[str]:
        """What `hal doctor` should tell about this backend on this machine, beyond found, absent or broken."""
        return ()
