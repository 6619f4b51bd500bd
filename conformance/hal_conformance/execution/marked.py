# SPDX-License-Identifier: Apache-2.0
"""Every process that a worker started, and those that these started, wherever they went.

A process group ends what stays in it. A daemon has left it, and its parent is gone; but it has the environment that it
was started with, or is a copy of a process that has, and in it the worker's mark.
"""

from __future__ import annotations

import contextlib
import os
import uuid

import psutil

NAME = "HAL_CONFORMANCE_WORKER"
"""The variable of the mark."""


def new() -> str:
    """Return a mark that no other worker has."""
    return uuid.uuid4().hex


def end(mark: str) -> None:
    """Kill every process with that mark but this one; again until there is none, since one may just have forked."""
    for _ in range(8):
        found = [process for process in psutil.process_iter() if process.pid != os.getpid() and _has(process, mark)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1.0)


def _has(process: psutil.Process, mark: str) -> bool:
    try:  # of other users' processes, and of dying ones, there is nothing to be read
        return process.environ().get(NAME) == mark
    except (psutil.Error, OSError, ValueError):
        return False
