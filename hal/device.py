# SPDX-License-Identifier: Apache-2.0
"""One opened device and its facets."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, final

from hal.errors import DeviceClosed
from hal.not_simulated import Listener
from hal.placement import place

if TYPE_CHECKING:
    import torch

    from hal.backend import Backend, DeviceInfo
    from hal.changes import Changes
    from hal.facets import Facets
    from hal.streams import Event, Stream
    from hal.support import Support


@final
class Device:
    """An opened device. Get one from `hal.open_device`, and `close()` it, or use it in a `with` statement.

    A device that is dropped without either, with all its facets, leaves the process as it is, with a
    `ResourceWarning` that names what stays changed. The next device that sets such a switch takes it over, and its
    `close()` puts the old value back.

    Attributes:
        info: facts that were known before opening.
        because: why this device was chosen.
        torch_device: what tensors and modules are moved to.
        memory, precision, collectives, random: the facets.
        contract: what the device declares about its arithmetic.
        changes: what opening and using it changed in this process; `close()` puts all of it back.
    """

    def __init__(self, info: DeviceInfo, because: str, backend: Backend, facets: Facets, changes: Changes) -> None:
        self.info = info
        self.because = because
        self.torch_device = facets.torch_device
        self.memory = facets.memory
        self.precision = facets.precision
        self.collectives = facets.collectives
        self.random = facets.random
        self.contract = facets.contract
        self._not_simulated = facets.not_simulated
        self.changes = changes
        self._streams = facets.streams
        self._support = facets.support
        self._backend = backend
        for facet in (facets.memory, facets.precision, facets.collectives, facets.random):
            facet.attach(changes)

    def __repr__(self) -> str:
        closed = " closed" if self.changes.closed else ""
        return f"<hal.Device {self.info.id} ({self.info.name or self.info.vendor}){closed}>"

    def _open(self) -> None:
        if self.changes.closed:
            raise DeviceClosed("the device is closed", device=self.info.id, hint="open it again")

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""
        self._open()
        self._streams.synchronize()

    def stream(self) -> Stream:
        """Return a new stream; on a device that works synchronously it is always empty."""
        self._open()
        return self._streams.stream()

    def event(self) -> Event:
        """Return a new event that takes the time."""
        self._open()
        return self._streams.event()

    def support(self, operator: str, dtype: torch.dtype) -> Support:
        """Tell whether the device computes an operator in a dtype, by trying it once.

        Raises:
            ConfigError: the table has no such operator; the message lists them.
        """
        self._open()
        return self._support.query(operator, dtype)

    def operators(self) -> tuple[str, ...]:
        """Return the names that `support` knows."""
        return self._support.operators()

    def not_simulated(self) -> dict[str, int]:
        """Return which operators a simulated device left to the CPU, and how often; of a real one there are none."""
        return self._not_simulated.calls()

    def on_not_simulated(self, listener: Listener) -> None:
        """Call `listener` with each such operator and its operands before it is computed; what it raises is raised."""
        self._not_simulated.listen(listener)

    def versions(self) -> dict[str, str | None]:
        """Return the versions that matter when results are compared; what is unknown is None."""
        import torch

        return {"torch": torch.__version__, **self._backend.versions()}

    def prepare(self, *objects: Any) -> Any:
        """Place on the device what a training loop has; the loop itself stays as it is.

        Nothing is moved if it can be seen that something cannot be. What only moving can show (a module whose own
        `to` refuses, a device that is full) is an error that says which objects are moved by then; they stay there,
        since moving back could fail as well.

        Args:
            objects: modules (moved in place); optimisers (their state is moved; their parameters must be those of
                modules in this call, or here already); batches, that is tensors and dicts, tuples and lists of them;
                and other iterables of batches, such as a DataLoader (wrapped: each batch is moved when it is
                fetched). torch gives a module new parameters when it moves to a plug-in device; the optimisers of
                this call follow them, and parameters that modules share stay shared.

        Returns:
            The same objects in the same order; one alone is returned as it is, not in a tuple.

        Raises:
            ConfigError: an object is none of these; a module has parameters on the meta device or lazy ones, which
                have no values or no shape yet; an optimiser holds parameters that are elsewhere; an object refused to
                move.
            OutOfMemoryError: the device has too little memory; what was moved until then stays there.
        """
        self._open()
        with self.memory.catch_out_of_memory():
            placed = place(self.info.id, self.torch_device, objects)
        return placed[0] if len(placed) == 1 else placed

    def close(self) -> None:
        """Put back everything that opening and using it changed. Harmless the second time; tensors stay valid.

        The facets refuse to work from now on. A switch that somebody else wrote meanwhile keeps that value, with a
        warning in the log.
        """
        self.changes.close()

    def __enter__(self) -> Device:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
