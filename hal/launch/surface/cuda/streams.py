# SPDX-License-Identifier: Apache-2.0
"""torch.cuda's streams, events and graphs.

On a CPU whatever was submitted is done, so that streams order nothing and events only take the time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

from hal.launch.api import active, api, count_made, refused, value
from hal.launch.redirection import Redirection
from hal.launch.surface.cuda.device import cuda_index
from hal.streams import HostEvent

_numbers = itertools.count(1)


class CudaEvent:
    """A point in time of a device that works synchronously."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False,
                 external: bool = False) -> None:  # fmt: skip
        count_made("torch.cuda.Event")
        if interprocess:
            r = active()
            if r is not None:
                raise r.refuse("torch.cuda.Event(interprocess=True)", "events of this device stay in their process")
        self._timed = enable_timing
        self._event = HostEvent()
        self._recorded = False
        self.cuda_event = 0

    def record(self, stream: Any = None) -> None:
        """Mark the present moment."""
        self._event.record()
        self._recorded = True

    def wait(self, stream: Any = None) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Return True: nothing is pending."""
        return True

    def synchronize(self) -> None:
        """Nothing is pending."""

    def elapsed_time(self, end_event: CudaEvent) -> float:
        """Return the milliseconds from this event to another.

        Raises:
            ValueError: one was made without timing, or not recorded; torch raises this, too.
        """
        if not (self._timed and end_event._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self._recorded and end_event._recorded):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return self._event.elapsed_ms(end_event._event)

    def __repr__(self) -> str:
        return f"<torch.cuda.Event {'recorded' if self._recorded else 'uninitialized'}>"


class CudaStream:
    """An order of work on a device that works synchronously."""

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int | None = None, **kwargs: Any) -> None:
        count_made("torch.cuda.Stream")
        r = active()
        self.device_index = 0 if r is None else cuda_index(r, device)
        self.priority = priority
        self.stream_id = next(_numbers) if stream_id is None else stream_id
        self.cuda_stream = self.stream_id
        self._entered: list[CudaStreamContext] = []

    @property
    def device(self) -> Any:
        """The CUDA device."""
        import torch

        return torch.device("cuda", self.device_index)

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Return True: nothing is pending."""
        return True

    def wait_event(self, event: Any) -> None:
        """Nothing is pending."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing is pending."""

    def record_event(self, event: Any = None) -> Any:
        """Mark the present moment."""
        event = CudaEvent() if event is None else event
        event.record(self)
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The priorities of CUDA streams; here they change nothing."""
        return 0, -5

    def __enter__(self) -> CudaStream:
        context = CudaStreamContext(self)
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, CudaStream)
            and (self.device_index, self.stream_id) == (other.device_index, other.stream_id)
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.device_index, self.stream_id))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device=cuda:{self.device_index} cuda_stream={self.cuda_stream:#x}>"


class CudaExternalStream(CudaStream):
    """A stream that another library made."""

    def __init__(self, stream_ptr: int, device: Any = None, **kwargs: Any) -> None:
        count_made("torch.cuda.ExternalStream")
        super().__init__(device, stream_id=int(stream_ptr))


class CudaStreamContext:
    """Makes a stream current inside a block; None changes nothing."""

    def __init__(self, stream: Any) -> None:
        count_made("torch.cuda.StreamContext")
        self.stream = stream
        self._before: Any = None

    def __enter__(self) -> None:
        r = active()
        if r is not None and self.stream is not None:
            self._before, r.stream = r.stream, self.stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        r = active()
        if r is not None and self.stream is not None:
            r.stream = self._before
        return False


def _own(r: Redirection, name: str, otherwise: type) -> type:
    """The class of the device's own module, which knows its streams, or ours on a CPU."""
    own = getattr(r.module, name, None)
    return own if r.hosts is None and isinstance(own, type) else otherwise


@value("torch.cuda.Event", "torch.cuda.streams.Event", verdict="emulated", note="takes the host's time on a CPU")
def event_class(r: Redirection) -> type:
    """See `CudaEvent`."""
    return _own(r, "Event", CudaEvent)


@value("torch.cuda.Stream", "torch.cuda.streams.Stream", verdict="emulated", note="orders nothing on a CPU")
def stream_class(r: Redirection) -> type:
    """See `CudaStream`."""
    return _own(r, "Stream", CudaStream)


@value("torch.cuda.ExternalStream", "torch.cuda.streams.ExternalStream", verdict="emulated")
def external_stream_class(r: Redirection) -> type:
    """See `CudaExternalStream`."""
    return _own(r, "ExternalStream", CudaExternalStream)


@value("torch.cuda.StreamContext", verdict="emulated")
def stream_context(r: Redirection) -> type:
    """See `CudaStreamContext`."""
    return _own(r, "StreamContext", CudaStreamContext)


@api("torch.cuda.stream", verdict="emulated", forwards=True)
def stream(r: Redirection, stream: Any) -> CudaStreamContext:
    """Make a stream current inside a block."""
    return CudaStreamContext(stream)


@api("torch.cuda.current_stream", "torch.accelerator.current_stream", verdict="emulated", forwards=True)
def current_stream(r: Redirection, device: Any = None) -> Any:
    """The stream that was made current in this thread, or the default one."""
    index = cuda_index(r, device)
    if r.stream is not None and r.stream.device_index == index:
        return r.stream
    return default_stream(r, index)


@api("torch.cuda.default_stream", verdict="emulated", forwards=True)
def default_stream(r: Redirection, device: Any = None) -> CudaStream:
    """Stream 0 of a device."""
    return CudaStream(cuda_index(r, device), stream_id=0)


@api("torch.cuda.set_stream", "torch.accelerator.set_stream", verdict="emulated", forwards=True)
def set_stream(r: Redirection, stream: Any) -> None:
    """Make a stream current in this thread; None changes nothing."""
    if stream is not None:
        r.stream = stream


@api("torch.cuda.get_stream_from_external", verdict="emulated")
def get_stream_from_external(r: Redirection, data_ptr: int, device: Any = None) -> CudaStream:
    """A stream that another library made."""
    return CudaExternalStream(data_ptr, device)


@api(
    "torch.cuda.is_current_stream_capturing",
    "torch.cuda.graphs.is_current_stream_capturing",
    belief=True,
    forwards=True,
)
def is_current_stream_capturing(r: Redirection) -> bool:
    """False: there are no graphs."""
    return False


class _Generic(type):
    """A class of torch's for streams or events of any device, which makes CUDA's for the program."""

    own: type
    ours: Callable[[Redirection], type]

    def __call__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        r = active()
        if r is None or "stream_id" in kwargs or "device_type" in kwargs:  # a stream that is there already
            return cls.own(*(() if device is None else (device,)), *args, **kwargs)
        if device is not None and r.index(device) is None:
            return cls.own(device, *args, **kwargs)
        count_made(f"torch.{cls.__name__}")
        if r.hosts is None:
            return cls.own(r.translate("cuda" if device is None else device), *args, **kwargs)
        ours = cls.ours(r)
        return ours(*args, **kwargs) if ours is CudaEvent else ours(device, *args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        r = active()
        return isinstance(instance, cls.own) or (r is not None and isinstance(instance, cls.ours(r)))

    def __subclasscheck__(cls, kind: type) -> bool:
        r = active()
        return issubclass(kind, cls.own) or (r is not None and issubclass(kind, cls.ours(r)))


def _generic(name: str, ours: Callable[[Redirection], type]) -> type:
    import torch

    made = _Generic(name, (), {"own": getattr(torch, name), "ours": staticmethod(ours)})
    made.__module__ = "torch"
    return made


@value("torch.Stream", verdict="emulated", note="of CUDA where none is named; orders nothing on a CPU")
def generic_stream(r: Redirection) -> type:
    """See `CudaStream`."""
    return _generic("Stream", stream_class)


@value("torch.Event", verdict="emulated", note="of CUDA where none is named; takes the host's time on a CPU")
def generic_event(r: Redirection) -> type:
    """See `CudaEvent`."""
    return _generic("Event", event_class)


_NO_GRAPHS = "there are no graphs of recorded kernels on this device"
_NO_GRAPHS_HINT = "the program's option that turns CUDA graphs off"


class CudaGraph:
    """A class that cannot be made, so that `isinstance` works."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        r = active()
        if r is None:
            raise RuntimeError(_NO_GRAPHS)
        raise r.refuse("torch.cuda.CUDAGraph", _NO_GRAPHS, _NO_GRAPHS_HINT)


@value("torch.cuda.CUDAGraph", "torch.cuda.graphs.CUDAGraph", verdict="refused", note=_NO_GRAPHS)
def graph_class(r: Redirection) -> type:
    """The device's graphs under whatever name its module has, or a class that cannot be made."""
    return next((found for name, found in vars(r.module).items() if name.endswith("PUGraph")), CudaGraph)


refused(
    "torch.cuda.graph", "torch.cuda.graphs.graph", "torch.cuda.make_graphed_callables",
    "torch.cuda.graphs.make_graphed_callables", "torch.cuda.graph_pool_handle", "torch.cuda.graphs.graph_pool_handle",
    why=_NO_GRAPHS, hint=_NO_GRAPHS_HINT,
)  # fmt: skip


# nvtx ----------------------------------------------------------------------------------------------------------------


def _said(r: Redirection, name: str) -> None:
    from torch.compiler import is_dynamo_compiling

    if not is_dynamo_compiling():
        r.idle(name, "no profiler of NVIDIA's is attached; torch.profiler works, and record_function names its ranges")


@api("torch.cuda.nvtx.range_push", "torch.cuda.nvtx.range_start", "torch.cuda.nvtx.mark", verdict="emulated",
     note="does nothing without NVIDIA's profiler; torch.profiler.record_function works")  # fmt: skip
def range_push(r: Redirection, msg: str) -> int:
    """Without NVIDIA's profiler these calls do nothing on CUDA either."""
    _said(r, "torch.cuda.nvtx")
    return 0


@api("torch.cuda.nvtx.range_pop", verdict="emulated", note="does nothing")
def range_pop(r: Redirection) -> int:
    """See `range_push`."""
    return 0


@api("torch.cuda.nvtx.range_end", verdict="emulated", note="does nothing")
def range_end(r: Redirection, range_id: int) -> None:
    """See `range_push`."""


class _Range(contextlib.ContextDecorator):
    def __enter__(self) -> _Range:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        return False


@api("torch.cuda.nvtx.range", verdict="emulated", note="does nothing")
def nvtx_range(r: Redirection, msg: str, *args: Any, **kwargs: Any) -> _Range:
    """See `range_push`."""
    _said(r, "torch.cuda.nvtx")
    return _Range()


@api("torch.autograd.profiler.emit_nvtx", verdict="emulated", note="does nothing; torch.profiler works")
def emit_nvtx(r: Redirection, enabled: bool = True, record_shapes: bool = False) -> _Range:
    """See `range_push`."""
    if enabled:
        _said(r, "torch.autograd.profiler.emit_nvtx")
    return _Range()
