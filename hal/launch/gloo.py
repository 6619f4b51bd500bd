# SPDX-License-Identifier: Apache-2.0
"""An end of Python that gloo's threads survive.

After a collective that a backward pass began, as DDP's do, the thread of gloo that carried it out drops Python objects.
The program does not wait for that. When Python is ending meanwhile, before 3.14, it ends any thread that asks for its
lock, and torch aborts the process: status -6 and "terminate called without an active exception" after a run in which
all went well (https://github.com/pytorch/pytorch/issues/190489). On two busy cores, 2 of 100 ranks ended so.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hal.launch.patches import Patches

PATIENCE_S = 1.0
"""How long a process may be held up by threads that still work: those that wait for a lost peer would for minutes."""

_watching: list[threading.Thread] = []
_pending: list[tuple[Any, Any]] = []
_polled: list[tuple[Callable[[], bool], Callable[[], None]]] = []
_poller: threading.Thread | None = None
_lock = threading.Lock()

_INTERVAL_S = 0.005
_THREADS = "pt_gloo_runloop"


def install(patches: Patches) -> None:
    """Have the end of this process settled."""
    atexit.register(settle)
    patches.on_undo(lambda: atexit.unregister(settle))


def watch(work: Callable[[], object]) -> None:
    """Run what waits for a work in a thread, which comes back from torch asking for Python's lock."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _watching[:] = [*(other for other in _watching if other.is_alive()), thread]


def expect(works: Sequence[Any], operands: Sequence[Any]) -> None:
    """Let the end of the process wait for works whose operands are Python's, if nobody has by then."""
    _pending[:] = [*(each for each in _pending if not each[0].is_completed()), *zip(works, operands, strict=True)]


def poll(done: Callable[[], bool], then: Callable[[], None]) -> None:
    """Call `then` once `done()` says so, from a thread of Python's own, which may end at any time."""
    global _poller
    with _lock:
        _polled.append((done, then))
        if _poller is None or not _poller.is_alive():  # a child that was forked has it no more
            _poller = threading.Thread(target=_poll, daemon=True)
            _poller.start()


def _poll() -> None:
    global _poller
    while True:
        time.sleep(_INTERVAL_S / 5)
        with _lock:
            ready = [each for each in _polled if each[0]()]
        for _, then in ready:
            then()
        with _lock:
            _polled[:] = [each for each in _polled if each not in ready]
            if not _polled:
                _poller = None
                return


def settle() -> None:
    """Wait until gloo's threads have nothing left to do, at most `PATIENCE_S`. Only Linux says what a thread does."""
    deadline = time.monotonic() + PATIENCE_S
    for thread in _watching:
        thread.join(max(0.0, deadline - time.monotonic()))
    while (left := [each for each in _pending if not each[0].is_completed()]) and time.monotonic() < deadline:
        time.sleep(_INTERVAL_S)
    for _, operand in left:  # for ever: gloo drops it when the peer is lost, and Python's part of it must not end there
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(operand))
    before = None
    while (now := _threads()) and time.monotonic() < deadline:
        # Asleep on both looks, and not awake between them. One that waits for Python's lock has it while we sleep.
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now
        time.sleep(_INTERVAL_S)


def _threads() -> dict[str, tuple[str, str]]:
    """Return the state of each of gloo's threads in this process, and how often it has gone to sleep."""
    seen = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            if (task / "comm").read_text().strip() != _THREADS:
                continue
            lines = (task / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        seen[task.name] = (fields["State"].split()[0], fields["voluntary_ctxt_switches"].strip())
    return seen
