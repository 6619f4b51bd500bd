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
import functools
import time
from pathlib import Path

from hal.launch.patches import Patches

PATIENCE_S = 1.0
"""How long a process may be held up by threads that still work: those that wait for a lost peer would for minutes."""

_INTERVAL_S = 0.005
_THREADS = "pt_gloo_runloop"


def install(patches: Patches) -> None:
    """Have the end of this process settled."""
    atexit.register(settle)
    patches.on_undo(functools.partial(atexit.unregister, settle))


def settle() -> None:
    """Wait until gloo's threads have nothing left to do, as long as patience lasts, or until it is interrupted.

    Only Linux says what a thread does.
    """
    deadline = time.monotonic() + PATIENCE_S
    before = None
    with contextlib.suppress(KeyboardInterrupt):
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
