# SPDX-License-Identifier: Apache-2.0
"""Running a few operators to find out what a device does: whatever surrounds the call must not decide the answer.

Nor may a bad moment. A device without free memory, or one that has failed altogether, says nothing about an operator:
that is an error, while a refusal of the operator is an answer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hal.errors import Broken, HalError, OutOfMemoryError
from hal.memory import requested_bytes

if TYPE_CHECKING:
    import torch

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|alloc\w*[ _]failed|failed to allocate", re.IGNORECASE)


@contextlib.contextmanager
def attempt(device_id: str, device: torch.device) -> Iterator[None]:
    """Run operators on a device as if nothing surrounded the call.

    Autocast and gradients are off inside, and so are modes that see every operator, torch's or the user's own: under a
    FakeTensorMode nothing is computed, and everything would be supported. Tensors inside must be made with their dtype
    and device, since `torch.set_default_dtype` and `torch.set_default_device` are the user's.

    Raises:
        OutOfMemoryError: there was no memory for the attempt.
        Broken: the device does not even make a tensor any more.
        Exception: everything else passes unchanged; it is about the operator.
    """
    import torch

    with torch.no_grad(), _without_modes(), contextlib.ExitStack() as off:
        for kind in {"cpu", device.type}:
            if _autocasts(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        except HalError:
            raise
        except Exception as error:
            trouble = _trouble(device_id, device, error)
            if trouble is None:
                raise
            raise trouble from error


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    from torch.utils import _python_dispatch

    # Both are torch's own affair, and there in 2.7 to 2.13. The second imports half a compiler, so it is only called
    # where there is a mode to leave.
    current = getattr(_python_dispatch, "_get_current_dispatch_mode", None)
    leave = getattr(_python_dispatch, "_disable_current_modes", None)
    if current is None or leave is None or current() is None:
        yield
        return
    with leave():
        yield


def _autocasts(kind: str) -> bool:
    import torch

    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # torch has no autocast for this type of device
        return False


def _trouble(device_id: str, device: torch.device, error: Exception) -> HalError | None:
    """Return what is wrong with the device itself, or None if it works and only the operator failed."""
    import torch

    if _lacks_memory(error):
        return OutOfMemoryError("out of memory", device=device_id, requested=requested_bytes(str(error)))
    try:
        torch.zeros(1, dtype=torch.float32, device=device).to("cpu")
    except Exception as second:  # noqa: BLE001  whatever the vendor raises
        if _lacks_memory(second):
            return OutOfMemoryError("out of memory", device=device_id, requested=requested_bytes(str(second)))
        return Broken(f"has failed, and makes no tensor any more: {error}", device=device_id)
    return None


def _lacks_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return _OUT_OF_MEMORY.search(str(error)) is not None
