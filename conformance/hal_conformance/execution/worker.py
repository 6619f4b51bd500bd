# SPDX-License-Identifier: Apache-2.0
"""The process in which one subject runs: it opens the device, runs cases, and sends back what they returned.

It judges nothing. It may be killed at any moment, and whatever an implementation does to it (raise, hang, exit,
flood its output, close its files) costs the case that was running and nothing else.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from hal_conformance import arguments, manifest
from hal_conformance import arrays as codec
from hal_conformance.case import Malformed, Params
from hal_conformance.execution import marked, soundness, wire
from hal_conformance.execution.plan import Catalogue
from hal_conformance.text import plain
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal_conformance.case import Arrays, Case, Footprint
    from hal_conformance.execution.process_state import ProcessState

MAX_OUTPUT = 4 << 30
"""Bytes of outputs that one case may return; a wrong shape must not fill the memory of two processes."""

ALWAYS_FITS = 64 << 20
"""Bytes of host memory for which the system is not asked: torch alone has several times as much."""

REPLACED = "a function replaced that the suite computes with: numpy's, hashlib's, or its own"


def main() -> None:
    """Serve one parent until it closes the connection. Never returns."""
    commands, events = _private_streams()
    try:
        _Worker(commands, events).serve()
    finally:
        # Threads and exit handlers of an implementation must not keep this process alive.
        os._exit(0)


def _private_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Take the two pipes away from stdin and stdout, which then lead to nothing and to stderr."""
    commands = os.fdopen(os.dup(0), "rb")
    events = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    events.write(wire.MAGIC)
    events.flush()
    return commands, events


class _Worker:
    def __init__(self, commands: IO[bytes], events: IO[bytes]) -> None:
        self._events = events
        self._pid = os.getpid()
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(commands,), daemon=True).start()
        self._device: Any = None
        self._ops: Any = None
        self._first: ProcessState | None = None  # before any implementation was loaded
        self._state: ProcessState | None = None  # as the one that is loaded wants it
        self._left, self._restored = "", True
        self._sound: Any = None
        self._not_simulated: Counter[str] = Counter()

    def _listen(self, commands: IO[bytes]) -> None:
        """Queue what the parent sends. When the parent is gone, so is this process, even amid a case."""
        try:
            while (message := wire.receive(commands)) is not None:
                self._commands.put(message[0])
        except (wire.WireError, OSError):
            pass
        marked.end(os.environ.get(marked.NAME, ""))
        if os.name == "posix" and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with whatever processes the implementation started
        os._exit(0)

    def _send(self, header: dict[str, Any], arrays: Arrays | None = None) -> None:
        if os.getpid() != self._pid:
            os._exit(0)  # a copy that an implementation forked and let run on
        wire.send(self._events, header, arrays)

    def serve(self) -> None:
        """Start up, then answer each command."""
        config = self._commands.get()
        if not self._start(config):
            return
        catalogue = Catalogue(config["catalogue"])
        while True:
            command = self._commands.get()
            if command["command"] == "close":
                self._device.close()
                self._send({"event": "closed"})
                return
            if command["command"] == "load":
                if not self._load(command["impl"], config["folder"]):
                    return
                continue
            params = Params(**command["params"])
            self._send(*self._answer(command["id"], catalogue.by_name(command["case"]), params))

    def _start(self, config: dict[str, Any]) -> bool:
        """Open the device and load the implementation; tell the parent about either."""
        from hal.errors import Absent, HalError, UnknownDevice
        from hal_conformance.execution import subject

        self._send({"event": "opening"})
        try:
            self._device = subject.load_attribute(config["opener"])(config["device"])
            opened = subject.describe(self._device)
        except BaseException as error:  # noqa: BLE001  a driver may raise anything
            kinds = {UnknownDevice: "unknown", Absent: "absent"}
            kind = next((name for type_, name in kinds.items() if isinstance(error, type_)), "broken")
            reason = getattr(error, "reason", None) or (str(error) if isinstance(error, HalError) else _last(error))
            self._send({"event": "failed", "kind": kind, "detail": plain(reason)})
            return False
        self._send({"event": "loading", "opened": opened})
        return self._load(config["impl"], config["folder"])

    def _load(self, impl: str, folder: str) -> bool:
        """Load an implementation, in place of the one before it if there was one; tell the parent."""
        import torch

        from hal_conformance.execution import subject
        from hal_conformance.execution.process_state import ProcessState

        try:
            device_type = torch.device(self._device.torch_device).type
            self._first = self._first or ProcessState(device_type)
            self._first.put_back()  # an implementation before this one may have changed it while it was loaded
            self._ops = subject.load_implementation(impl, folder)
            self._state = ProcessState(device_type)
            self._sound = soundness.reading()
        except BaseException as error:  # noqa: BLE001  importing an implementation may raise anything
            self._send({"event": "failed", "kind": "implementation", "detail": plain(_last(error))})
            return False
        # Switches once more: to import an implementation may have set some.
        described = {"implementation": manifest.implementation(self._ops, impl), "flags": manifest.flags()}
        self._send({"event": "ready", **described})
        return True

    def _answer(self, number: int, case: Case, params: Params) -> tuple[dict[str, Any], Arrays]:
        answer: dict[str, Any] = {"event": "observed", "id": number, "status": None, "detail": "", "healthy": True}
        outputs: Arrays = {}
        self._left, self._restored = "", True
        started = time.perf_counter()
        try:
            if reason := self._unsupported(case, params.dtype):
                return {**answer, "status": Status.UNSUPPORTED.value, "detail": plain(reason), "seconds": 0.0}, outputs
            if reason := too_large(case.footprint(params)):
                return {**answer, "status": Status.SKIPPED.value, "detail": reason, "seconds": 0.0}, outputs
            inputs = case.inputs(params)
            answer["hashes"] = codec.digests(inputs)
            started = time.perf_counter()
            outputs = self._run(case, inputs, params)
        except BaseException as error:  # noqa: BLE001  this is where foreign code ends up
            answer.update(self._excuse(error))
        answer["seconds"] = time.perf_counter() - started
        if left := self._left_to_the_cpu():
            answer["detail"] = plain("; ".join(filter(None, (answer["detail"], f"not simulated: {left}"))))
        if soundness.reading() != self._sound:
            self._left, self._restored = self._left or f"left {REPLACED}", False
        answer["healthy"] = answer["healthy"] and self._restored
        if self._left:
            detail = "; ".join(filter(None, (answer["detail"], self._left)))
            answer["detail"] = plain(detail)
            if answer["status"] != Status.CRASH.value:
                answer["status"], outputs = Status.FAIL_STRUCTURE.value, {}
        return answer, outputs

    def _left_to_the_cpu(self) -> str:
        """Return what a simulated device has not simulated since this was asked last."""
        now = Counter(self._device.not_simulated())
        since, self._not_simulated = now - self._not_simulated, now
        return ", ".join(f"{name} ({count} times)" for name, count in sorted(since.items()))

    def _unsupported(self, case: Case, dtype: str) -> str:
        missing = [name for name in case.needs if not callable(getattr(self._ops, name, None))]
        if missing:
            return f"the implementation has no {', '.join(missing)}"
        import torch

        support = self._device.support("matmul", getattr(torch, dtype))
        return "" if support else f"{dtype}: {support.reason}"

    def _run(self, case: Case, inputs: Arrays, params: Params) -> Arrays:
        import torch

        device = torch.empty(0, device=self._device.torch_device).device
        tensors = {name: codec.to_torch(array, device) for name, array in inputs.items()}
        given = dict(tensors)
        assert self._state is not None
        try:
            with arguments.watched(self._ops, tensors.values()) as ops:
                returned = case.run(ops, given, params)
            self._device.synchronize()
        finally:
            self._left, self._restored = self._state.put_back()
        outputs = _check(returned, device)
        for name, tensor in tensors.items():
            after, before = codec.to_buffer(codec.from_torch(tensor)), codec.to_buffer(inputs[name])
            if not np.array_equal(np.asarray(after), np.asarray(before)):
                raise Malformed(f"the implementation wrote into its input {name}")
        ops.check()
        return outputs

    def _excuse(self, error: BaseException) -> dict[str, Any]:
        """Turn what a case raised into a verdict, and find out whether the device survived it."""
        from hal.errors import Unsupported

        if isinstance(error, Unsupported):
            return {"status": Status.UNSUPPORTED.value, "detail": plain(error.reason)}
        if isinstance(error, Malformed):
            return {"status": Status.FAIL_STRUCTURE.value, "detail": plain(error)}
        return {"status": Status.CRASH.value, "detail": plain(f"raised {_last(error)}"), "healthy": self._healthy()}

    def _healthy(self) -> bool:
        """Tell whether the device still computes: some errors poison a process for good."""
        try:
            import torch

            self._device.synchronize()
            return soundness.has_room() and bool(
                (torch.ones(2, device=self._device.torch_device) * 2).sum().item() == 4
            )
        except BaseException:  # noqa: BLE001  the answer is no, whatever it raises
            return False


def too_large(size: Footprint) -> str:
    """Return why a task cannot be run on this host, or nothing: a machine without memory is not a wrong result."""
    import psutil

    if size.outputs > MAX_OUTPUT:
        return f"its outputs have {size.outputs / 2**30:.1f} GiB; a case may return {MAX_OUTPUT >> 30}"
    if size.host < ALWAYS_FITS:
        return ""
    available = psutil.virtual_memory().available
    if size.host > available:
        return f"needs about {size.host / 2**30:.1f} GiB of host memory, and {available / 2**30:.1f} are available"
    return ""


def _check(returned: Any, device: Any) -> Arrays:
    """Return the outputs as arrays.

    Raises:
        Malformed: something else than dense tensors on the device came back.
    """
    import torch

    if not isinstance(returned, dict) or not all(isinstance(name, str) for name in returned):
        raise Malformed(f"returned a {type(returned).__name__} where named tensors were expected")
    for name, tensor in returned.items():
        if not isinstance(tensor, torch.Tensor):
            raise Malformed(f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.device != device:
            raise Malformed(f"{name} is on {tensor.device}, not on {device}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise Malformed(
                f"{name} has the layout {'nested' if tensor.is_nested else tensor.layout}, not torch.strided"
            )
        if not arguments.has_elements(tensor):
            raise Malformed(f"{name} is a {type(tensor).__name__}, which has no elements of its own")
    size = sum(tensor.numel() * tensor.element_size() for tensor in returned.values())
    if size > MAX_OUTPUT:
        raise Malformed(f"returned {size} bytes, more than the {MAX_OUTPUT} that a case may return")
    try:
        return {name: codec.from_torch(tensor) for name, tensor in returned.items()}
    except TypeError as error:
        raise Malformed(str(error)) from error


def _last(error: BaseException) -> str:
    """Return the last line of a traceback and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""  # noqa: PTH119
    return f"{type(error).__name__}: {plain(error)}{where}"


def run_from_command_line() -> None:
    """Entry of a spawned process; see `process.BOOT`."""
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.argv[1:] = []
    main()
