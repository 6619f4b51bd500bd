# SPDX-License-Identifier: Apache-2.0
"""Memory of one device: statistics with their sources, limits, and one out-of-memory error."""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, final

from hal.arguments import integer
from hal.changes import Switch
from hal.errors import ConfigError, HalError, OutOfMemoryError, UnsupportedOperation
from hal.facet import Facet
from hal.memory_stats import MemoryStats

if TYPE_CHECKING:
    import torch


class Memory(Facet, abc.ABC):
    """Memory of one opened device. A backend implements the hooks that start with an underscore.

    Every method raises `DeviceClosed` once the device is closed.

    Args:
        device_id: for messages.
        changes: see `Facet`.
    """

    # statistics ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _allocated(self) -> int | None: ...

    @abc.abstractmethod
    def _stats(self) -> MemoryStats: ...

    @abc.abstractmethod
    def _reset_peak(self) -> None: ...

    @abc.abstractmethod
    def _empty_cache(self) -> None: ...

    def _snapshot(self) -> list[dict[str, Any]]:
        raise UnsupportedOperation("has no allocator snapshot", device=self.device_id, what="memory.snapshot")

    @final
    def allocated(self) -> int | None:
        """Return the bytes in live tensors of this process on this device. Cheap: no synchronisation."""
        self.check_open()
        return self._allocated()

    @final
    def stats(self) -> MemoryStats:
        """Return all statistics. Cheap enough for every step; asks the driver for `free` and `total`."""
        self.check_open()
        return self._stats()

    @final
    def reset_peak(self) -> None:
        """Start the peaks anew from the current values.

        Raises:
            UnsupportedOperation: the device cannot.
        """
        self.check_open()
        self._reset_peak()

    @final
    def empty_cache(self) -> None:
        """Return cached blocks that hold no tensor to the driver."""
        self.check_open()
        self._empty_cache()

    @final
    def snapshot(self) -> list[dict[str, Any]]:
        """Return the allocator's segments on this device, each a dict in the vendor's own form.

        Raises:
            UnsupportedOperation: the device keeps no such list.
        """
        self.check_open()
        return self._snapshot()

    # limit -----------------------------------------------------------------------------------------------------

    def _limit_switch(self) -> Switch:
        """Return the switch that is this device's limit, in bytes.

        Raises:
            UnsupportedOperation: the device has none.
        """
        raise UnsupportedOperation("has no memory limit", device=self.device_id, what="memory.limit")

    def _limit_value(self, nbytes: int) -> int:
        """Return what the switch is to be set to for a limit of `nbytes`.

        Raises:
            ConfigError: this limit cannot be set.
        """
        return nbytes

    def least_limit(self) -> int:
        """Return the smallest limit in bytes that can be set now."""
        return 1

    @final
    def limit(self, nbytes: int | None) -> None:
        """Let this process allocate at most `nbytes` on this device, until another call or `close()`.

        An allocation beyond it raises inside `catch_out_of_memory()` as our `OutOfMemoryError`. The limit is the
        process's: it is listed in `Device.changes`, and what was in force before comes back with the last handle of
        the device that lets go of it.

        Args:
            nbytes: the limit; None lets go of the one that this handle set.

        Raises:
            ConfigError: `nbytes` is no positive integer, or the system does not allow this limit.
            DeviceConflict: another open handle holds another limit.
            UnsupportedOperation: the device has no such limit.
        """
        self.check_open()
        switch = self._limit_switch()
        if nbytes is None:
            self._changes.release([switch.name])
        else:
            nbytes = integer(f"{self.device_id}: the memory limit in bytes", nbytes, least=1)
            self._changes.set(switch, self._limit_value(nbytes))

    # the rest --------------------------------------------------------------------------------------------------

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        raise UnsupportedOperation("has no page-locked memory", device=self.device_id, what="memory.pin")

    @final
    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a CPU tensor in page-locked memory, from which this device copies asynchronously.

        On a device that shares the host's memory the tensor itself is right already and is returned.

        Raises:
            ConfigError: this is no tensor on the CPU.
            UnsupportedOperation: the device has no page-locked memory.
        """
        import torch

        self.check_open()
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            kind = f"a tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise ConfigError(f"{self.device_id}: cannot pin {kind}", expected="a tensor on the CPU")
        return self._pin(tensor)

    @final
    @contextlib.contextmanager
    def catch_out_of_memory(self) -> Iterator[None]:
        """Turn the vendor's out-of-memory error inside the block into `OutOfMemoryError`, with statistics.

        Other errors pass unchanged.
        """
        self.check_open()
        try:
            yield
        except OutOfMemoryError:
            raise
        except Exception as error:
            # A collective that ran out of memory arrives as our `CollectiveError`, the vendor's error chained.
            ours = isinstance(error, HalError) and isinstance(error.__cause__, Exception)
            found = self._out_of_memory(error.__cause__ if ours else error)  # type: ignore[arg-type]
            if found is None:
                raise
            raise OutOfMemoryError(
                "out of memory", device=self.device_id, requested=found[0], stats=self._stats()
            ) from error

    def _out_of_memory(self, error: Exception) -> tuple[int | None] | None:
        """Return (requested bytes or None,) if the error means that memory ran out, otherwise None."""
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return (requested_bytes(str(error)),)
        # torch's host allocator, which also serves pinned memory, raises a plain RuntimeError.
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return (requested_bytes(str(error)),)
        return None


def requested_bytes(message: str) -> int | None:
    """Read the requested size out of an allocator's message, such as `Tried to allocate 2.00 GiB`."""
    match = re.search(r"allocate ([\d.]+) (bytes|[KMGT]iB)", message)
    if match is None:
        return None
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[match[2]]
    return int(float(match[1]) * unit)
