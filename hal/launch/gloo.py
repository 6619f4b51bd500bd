# SPDX-License-Identifier: Apache-2.0
"""An end of Python that gloo's threads survive.

After a collective that a backward pass began, as DDP's do, the thread of gloo that carried it out drops Python objects.
The program does not wait for that. When Python is ending meanwhile, before 3.14, it ends any thread that asks for its
lock, and torch aborts the process: status -6 and "terminate called without an active exception" after a run in which
all went well (https://github.com/pytorch/pytorch/issues/190489). On two busy cores, 2 of 100 ranks ended so.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hal.launch.patches import Patches

PATIENCE_S = 1.0
"""How long a process may be held up by threads that still work: those that wait for a lost peer would for minutes."""

PATIENCE_WITH_PEERS_S = 5.0
"""The same for a work whose future was asked for: one that comes back while Python is ending ends the process."""

_watching: list[threading.Thread] = []

_INTERVAL_S = 0.005
_THREADS = "pt_gloo_runloop"


def install(patches: Patches) -> None:
    """Have the end of this process settled."""
    atexit.register(settle)
    patches.on_undo(_uninstall)


def _uninstall() -> None:
    if not any(thread.is_alive() for thread in _watching):
        atexit.unregister(settle)


def watch(work: Callable[[], object]) -> None:
    """Run what waits for a work in a thread, which comes back from torch asking for Python's lock."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _watching[:] = [*(other for other in _watching if other.is_alive()), thread]


def settle() -> None:
    """Wait until gloo's threads have nothing left to do, as long as patience lasts, or until it is interrupted."""
    with contextlib.suppress(KeyboardInterrupt):
        _settle()


def _settle() -> None:
    """Wait. Only Linux says what a thread does.

    Those that wait for a work come back when the peer does, or ends. A program that failed must not wait for that: its
    peers may be waiting for it.
    """
    failed = getattr(sys, "last_value", None) is not None
    deadline = time.monotonic() + (PATIENCE_S if failed else PATIENCE_WITH_PEERS_S)
    for thread in _watching:
        thread.join(max(0.0, deadline - time.monotonic()))
    deadline = time.monotonic() + PATIENCE_S
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
