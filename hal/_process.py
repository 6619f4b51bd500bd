# SPDX-License-Identifier: Apache-2.0
"""Runs a short Python program in a child process that may hang, die or leave children of its own behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

# `-m` and `-c` put the current folder on the path, where a file named torch.py would be taken for torch.
PREAMBLE = "import sys; sys.path[:] = [p for p in sys.path if p]; "

_GLANCE_S = 0.2
"""How often a wait looks whether it is to stop: soon enough for somebody who pressed Ctrl-C."""


@dataclass(frozen=True)
class Ending:
    """How a child ended and what it had written by then.

    Attributes:
        fault: None if it ended with status 0, otherwise how it ended, in words that follow "the process".
        output, errors: of stdout and stderr.
    """

    fault: str | None
    output: str
    errors: str

    def last_line(self) -> str:
        """Return the last line on stderr that is not empty: of a traceback, the exception."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def run_python(
    code: str,
    *arguments: str,
    environment: Mapping[str, str],
    timeout_s: float,
    stop: threading.Event | None = None,
) -> Ending:
    """Run Python code in a child of this interpreter; kill it, and what it started, after `timeout_s` seconds.

    Where that is waited for on another thread, setting `stop` kills the child at once: an interrupt reaches the main
    thread only.
    """
    # Files, not pipes: a grandchild that outlives the child would keep a pipe open, and reading it would hang here.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, *arguments], env=dict(environment),
            stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            fault = _wait(child, timeout_s, stop)
        finally:
            _kill(child)
        return Ending(fault, _read(output), _read(errors))


def _wait(child: subprocess.Popen[bytes], timeout_s: float, stop: threading.Event | None) -> str | None:
    """Return how the child ended, None if with status 0."""
    deadline = time.monotonic() + timeout_s
    while stop is None or not stop.is_set():
        left = deadline - time.monotonic()
        if left <= 0:
            return f"did not answer within {timeout_s:g} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            return _in_words(child.wait(left if stop is None else min(left, _GLANCE_S)))
    return "was stopped"


def _kill(child: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        # Its own session: the group holds the child and what it started, and nothing else.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _in_words(code: int) -> str | None:
    if code == 0:
        return None
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with status {code}"
