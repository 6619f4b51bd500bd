# SPDX-License-Identifier: Apache-2.0
"""CUDA as the program sees it, and the devices that it really is.

CUDA device `i` of the program is the i-th of the given devices. Devices that torch calls `cuda` need no redirection.
"""

from __future__ import annotations

import functools
import logging
import numbers
import operator
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, final

from hal.errors import UnsupportedOperation
from hal.launch.audit import Audit
from hal.launch.host import HostTensors

if TYPE_CHECKING:
    import torch

    from hal.device import Device

log = logging.getLogger("hal")


@final
class Redirection:
    """Translates devices both ways for one process.

    Args:
        devices: what CUDA's devices 0, 1, ... are; on a CPU the same device may stand several times.
        strict: refuse what may change results, instead of noting it.

    Attributes:
        type: the torch device type of all devices.
        true_devices: of all of them, whatever CUDA_VISIBLE_DEVICES says.
        hosts: the tensors on the host, where a tensor's device does not tell; otherwise None.
        audit: counts of this process.
    """

    def __init__(self, devices: Sequence[Device], strict: bool = False) -> None:
        import torch

        self._all = tuple(devices)
        self.strict = strict
        self.audit = Audit()
        self.type = devices[0].torch_device.type
        self.true_devices = frozenset(device.torch_device for device in devices)
        self.hosts = HostTensors() if self.type == "cpu" else None
        self.module = torch.get_device_module(devices[0].torch_device)
        """What torch has for this type of device, such as `torch.npu`."""
        self.kept: dict[str, Any] = {}
        """What the program set of CUDA's that nobody reads here but itself, by the name that it is asked for with."""
        self.default_type_on_device = False
        """Whether the program's default type of tensors is one of CUDA's."""
        self.groups = _GROUPS
        self._local = threading.local()
        self._said: set[str] = set()
        self._torch_device = torch.device

    @functools.cached_property
    def devices(self) -> tuple[Device, ...]:
        """What CUDA's devices 0, 1, ... are; CUDA_VISIBLE_DEVICES counts, which CUDA reads on first use, too."""
        text = os.environ.get("CUDA_VISIBLE_DEVICES")
        return self._all if text is None else tuple(self._all[index] for index in visible(text, len(self._all)))

    @functools.cached_property
    def targets(self) -> tuple[torch.device, ...]:
        """The true devices of CUDA's devices 0, 1, ..."""
        return tuple(device.torch_device for device in self.devices)

    @functools.cached_property
    def _cuda(self) -> tuple[torch.device, ...]:
        return tuple(self._torch_device("cuda", index) for index in range(len(self.devices)))

    @functools.cached_property
    def _index(self) -> dict[int | None, int]:
        return {target.index: index for index, target in enumerate(self.targets)}

    # Current device ----------------------------------------------------------------------------------------------

    @property
    def current(self) -> int:
        """The program's current CUDA device; as in CUDA, one for each thread."""
        index: int = getattr(self._local, "index", 0)
        return index

    @current.setter
    def current(self, index: int) -> None:
        self._local.index = self.checked(index)
        if self.targets[index].index is not None:
            self.module.set_device(self.targets[index])

    @property
    def device(self) -> Device:
        """The device that the current CUDA device really is; the first of all if the program sees none."""
        return self.devices[self.current] if self.devices else self._all[0]

    def checked(self, index: int) -> int:
        """Return an index if there is such a CUDA device.

        Raises:
            RuntimeError: there is none; CUDA raises this, too.
        """
        if not self.devices:
            raise RuntimeError(
                f"No CUDA GPUs are available: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
            )
        if not 0 <= index < len(self.devices):
            there = "cuda:0 only" if len(self.devices) == 1 else f"cuda:0 to cuda:{len(self.devices) - 1}"
            raise RuntimeError(
                f"CUDA error: invalid device ordinal: cuda:{index} was asked for, and there is {there} "
                f"({', '.join(device.info.id for device in self.devices)}); `hal run --nproc` gives a CPU one for each "
                "process of this host"
            )
        return index

    @property
    def stream(self) -> Any:
        """The stream that the program made current in this thread, or None."""
        return getattr(self._local, "stream", None)

    @stream.setter
    def stream(self, stream: Any) -> None:
        self._local.stream = stream

    @property
    def moving(self) -> bool | None:
        """Whether the module that this thread is moving goes to the host; None while it moves none."""
        moving: bool | None = getattr(self._local, "moving", None)
        return moving

    @moving.setter
    def moving(self, host: bool | None) -> None:
        self._local.moving = host

    # From the program to torch -----------------------------------------------------------------------------------

    def index(self, device: Any) -> int | None:
        """Return which CUDA device is meant, or None if `device` is no CUDA device.

        None, a plain "cuda" and a CUDA device without index are the current one. Integers are indices, as everywhere
        in `torch.cuda`.

        Raises:
            RuntimeError: there is no such CUDA device.
        """
        if device is None:
            return self.checked(self.current)
        if isinstance(device, str):
            if not device.startswith("cuda"):
                return None
            device = self._torch_device(device)  # torch's own error for what it cannot read
        if isinstance(device, self._torch_device):
            if device.type != "cuda":
                return None
            return self.checked(self.current if device.index is None else device.index)
        if is_number(device):
            device = operator.index(device)
            return self.checked(self.current if device == -1 else device)
        return None

    def translate(self, device: Any) -> Any:
        """Return the true device of a CUDA device; anything else as it is.

        Raises:
            RuntimeError: there is no such CUDA device.
        """
        if device is None or isinstance(device, bool):
            return device
        index = self.index(device)
        return device if index is None else self.targets[index]

    def translate_type(self, device_type: Any) -> Any:
        """Return the true type of device for "cuda" or "cuda:0"; anything else as it is."""
        is_cuda = isinstance(device_type, str) and device_type.partition(":")[0] == "cuda"
        return self.type if is_cuda else device_type

    def is_host(self, device: Any) -> bool:
        """Return whether the program names the host, as `"cpu"` or a torch.device of that type."""
        if isinstance(device, self._torch_device):
            return device.type == "cpu"
        return isinstance(device, str) and (device == "cpu" or device.startswith("cpu:"))

    # From torch to the program -----------------------------------------------------------------------------------

    def present(self, true: torch.device) -> torch.device:
        """Return the CUDA device that the program sees for a true device; another type as it is."""
        if true.type != self.type:
            return true
        if self.hosts is not None:
            return self._cuda[self.current] if self._cuda else true
        index = self._index.get(true.index)
        return true if index is None else self._cuda[index]

    # What is not as on CUDA --------------------------------------------------------------------------------------

    def change(self, api: str, note: str) -> None:
        """Note that results may differ from CUDA's, or refuse it in strict mode, naming the line.

        Raises:
            UnsupportedOperation: in strict mode.
        """
        frame = sys._getframe(1)
        self._refuse_in_strict_mode(api, note, frame)
        self.audit.note("change", api, note, frame)

    def fallback(self, api: str, note: str, nbytes: int) -> None:
        """Note that an operator which the device lacks runs another way, or refuse it in strict mode, naming the line.

        Raises:
            UnsupportedOperation: in strict mode.
        """
        frame = sys._getframe(1)
        self._refuse_in_strict_mode(api, f"{self.type} lacks it, and it is computed another way: {note}", frame)
        if not isinstance(nbytes, int):  # of a shape that is traced, and not known
            nbytes = 0
        self.audit.note("fallback", api, note, frame, nbytes)

    def _refuse_in_strict_mode(self, api: str, note: str, frame: FrameType) -> None:
        if self.strict:
            self.audit.note("refused", api, note, frame)
            raise UnsupportedOperation(
                f"{api} at {self.audit.where(frame)} would change its meaning: {note}",
                device=self.device.info.id, what=api,
                hint="without --strict it is only noted in the report",
            )  # fmt: skip

    def idle(self, api: str, note: str) -> None:
        """Note that a call does nothing here, and say so the first time."""
        frame = sys._getframe(1)
        self.audit.note("idle", api, note, frame)
        if api not in self._said:
            self._said.add(api)
            log.warning("%s at %s does nothing on %s: %s", api, self.audit.where(frame), self.device.info.id, note)

    def refuse(self, api: str, why: str, hint: str = "") -> UnsupportedOperation:
        """Return the error that refuses a call, and note it. It is a RuntimeError, as torch's own would be."""
        frame = sys._getframe(1)
        self.audit.note("refused", api, why, frame)
        return UnsupportedOperation(
            f"{api} at {self.audit.where(frame)}: {why}", device=self.device.info.id, what=api, hint=hint
        )


_GROUPS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""What the program asked for, by process group, which may outlive an adoption."""


def is_number(device: Any) -> bool:
    """Return whether a device is given by its index: a plain integer, or one of numpy's."""
    return isinstance(device, int | numbers.Integral) and not isinstance(device, bool)


def visible(text: str, count: int) -> list[int]:
    """Return which of `count` devices CUDA_VISIBLE_DEVICES lets a program see, in its order.

    As CUDA reads it: what follows the first entry that is no device is ignored, and a device that stands twice makes
    all of them invisible. An identifier such as `GPU-8932f937` names no device here, and is taken for the next one.
    """
    found: list[int] = []
    for position, entry in enumerate(text.split(",")):
        entry = entry.strip()
        try:
            index = int(entry)
        except ValueError:
            index = position if entry.startswith(("GPU-", "MIG-")) else -1
        if not 0 <= index < count:
            break
        if index in found:
            return []
        found.append(index)
    return found
