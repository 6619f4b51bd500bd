# SPDX-License-Identifier: Apache-2.0
"""Streams and events of one device: order of work, and time between two points of it."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

from hal.errors import ConfigError, UnsupportedOperation

if TYPE_CHECKING:
    import torch


class Stream(abc.ABC):
    """Work on one stream runs in the order of submission; between streams only where one waits for another.

    As a context manager it is the current stream inside the block.
    """

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until everything submitted so far is done."""

    @abc.abstractmethod
    def wait(self, event: Event) -> None:
        """Let later work of this stream start only after `event`."""

    @abc.abstractmethod
    def __enter__(self) -> Stream: ...

    @abc.abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Event(abc.ABC):
    """A point in a stream's work."""

    @abc.abstractmethod
    def record(self, stream: Stream | None = None) -> None:
        """Mark the current end of `stream`'s work, or of the current stream's."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until the marked point is reached; an event never recorded counts as reached."""

    @abc.abstractmethod
    def query(self) -> bool:
        """Return whether the marked point is reached."""

    @abc.abstractmethod
    def elapsed_ms(self, later: Event) -> float:
        """Return the milliseconds from this event to `later`. Both must be recorded with timing and reached.

        Raises:
            ConfigError: one was not recorded.
        """


class Streams(abc.ABC):
    """Makes the streams and events of one opened device."""

    @abc.abstractmethod
    def stream(self) -> Stream:
        """Return a new stream."""

    @abc.abstractmethod
    def event(self) -> Event:
        """Return a new event that takes the time."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until all work on the device is done."""


@final
class TorchStream(Stream):
    """A `torch.Stream`."""

    def __init__(self, raw: torch.Stream) -> None:
        self.raw = raw

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        with _refusals(self.raw.device, "stream"):
            self.raw.synchronize()

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        if not isinstance(event, TorchEvent):
            raise ConfigError(f"a {type(event).__name__} is of another device", expected="an event of this device")
        with _refusals(self.raw.device):
            self.raw.wait_event(event.raw)

    def __enter__(self) -> TorchStream:
        self.raw.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw.__exit__(kind, error, trace)


@contextlib.contextmanager
def _refusals(device: torch.device | None, what: str = "event") -> Iterator[None]:
    """Turn what torch's guard of a device type says it lacks, at the call and only in words, into our error.

    The words differ in case: "Backend doesn't support events." is the base class's answer, "cpu backend doesn't
    support events." that of a guard without devices (c10/core/impl/DeviceGuardImplInterface.h).
    """
    try:
        yield
    except RuntimeError as error:
        if "backend doesn't support" not in str(error).lower():
            raise
        raise UnsupportedOperation(str(error), device=str(device), what=what) from error


@final
class TorchEvent(Event):
    """A `torch.Event`."""

    def __init__(self, raw: torch.Event) -> None:
        self.raw = raw
        self._recorded = False

    def record(self, stream: Stream | None = None) -> None:
        """See `Event.record`."""
        if stream is not None and not isinstance(stream, TorchStream):
            raise ConfigError(f"a {type(stream).__name__} is of another device", expected="a stream of this device")
        with _refusals(self.raw.device):
            self.raw.record() if stream is None else self.raw.record(stream.raw)
        self._recorded = True

    def synchronize(self) -> None:
        """See `Event.synchronize`."""
        with _refusals(self.raw.device):
            self.raw.synchronize()

    def query(self) -> bool:
        """See `Event.query`."""
        with _refusals(self.raw.device):
            return bool(self.raw.query())

    def elapsed_ms(self, later: Event) -> float:
        """See `Event.elapsed_ms`."""
        if not isinstance(later, TorchEvent) or not (self._recorded and later._recorded):
            raise ConfigError("the time between events that were not both recorded", expected="record() on both")
        with _refusals(self.raw.device):
            return float(self.raw.elapsed_time(later.raw))


@final
class TorchStreams(Streams):
    """Streams and events of a device that torch counts among its accelerators."""

    def __init__(self, device: torch.device, module: Any) -> None:
        self._device = device
        self._module = module

    def stream(self) -> TorchStream:
        """See `Streams.stream`."""
        import torch

        with _refusals(self._device, "stream"):
            return TorchStream(torch.Stream(self._device))

    def event(self) -> TorchEvent:
        """See `Streams.event`."""
        import torch

        with _refusals(self._device):
            return TorchEvent(torch.Event(self._device, enable_timing=True))

    def synchronize(self) -> None:
        """See `Streams.synchronize`."""
        self._module.synchronize(self._device)


@final
class HostStream(Stream):
    """A stream of a device that works synchronously: whatever was submitted is done."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait(self, event: Event) -> None:
        """An event of the host is always reached."""

    def __enter__(self) -> HostStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@final
class HostEvent(Event):
    """The time on the host's monotonic clock, in a device that works synchronously."""

    def __init__(self) -> None:
        self._time_ns: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        """See `Event.record`."""
        self._time_ns = time.perf_counter_ns()

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Return True: nothing is pending."""
        return True

    def elapsed_ms(self, later: Event) -> float:
        """See `Event.elapsed_ms`."""
        if not isinstance(later, HostEvent) or self._time_ns is None or later._time_ns is None:
            raise ConfigError("the time between events that were not both recorded", expected="record() on both")
        return (later._time_ns - self._time_ns) / 1e6


@final
class HostStreams(Streams):
    """Streams of a device that works synchronously, such as a CPU."""

    def stream(self) -> HostStream:
        """See `Streams.stream`."""
        return HostStream()

    def event(self) -> HostEvent:
        """See `Streams.event`."""
        return HostEvent()

    def synchronize(self) -> None:
        """Nothing is pending."""
