# SPDX-License-Identifier: Apache-2.0
"""Several processes that judge beside one another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any


def pool(processes: int, set_up: Callable[..., object] | None = None, *given: Any) -> ProcessPoolExecutor:
    """Return a pool of spawned processes, each of which ends when this one does, whatever ends it.

    An executor's own would wait for work for ever: what tells them that there is none is held open by each other.

    Args:
        processes: how many.
        set_up: called with `given` in each of them before its first work. Importable, as are its arguments.
    """
    return ProcessPoolExecutor(processes, get_context("spawn"), _begin, (set_up, *given))


def _begin(set_up: Callable[..., object] | None, *given: Any) -> None:
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="end with the parent", daemon=True).start()
    if set_up is not None:
        set_up(*given)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
