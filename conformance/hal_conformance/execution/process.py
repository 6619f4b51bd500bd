# SPDX-License-Identifier: Apache-2.0
"""The parent's side of one worker process: start it, talk to it with time limits, and end it for certain."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hal.autoload import AUTOLOAD
from hal_conformance.execution import marked, wire
from hal_conformance.text import plain

if TYPE_CHECKING:
    from hal_conformance.case import Arrays

# `-c` puts the current folder on the path, where a stray numpy.py would be found; the parent's own path replaces it.
BOOT = """\
import sys
sys.path[:] = [p for p in sys.path if p]
import json
sys.path[:] = json.loads(sys.argv[1])
from hal_conformance.execution.worker import run_from_command_line
run_from_command_line()
"""

TAIL = 4096
"""Bytes of a worker's stdout and stderr that are kept, for its last words."""


class Died(Exception):
    """The worker is gone; the text says how."""


class TimedOut(Exception):
    """Nothing came from the worker in time."""


def _environment(mark: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment: what the user set, and what keeps it alive and out of the judge's way.

    Args:
        mark: by which the processes that it starts are known.
        given: comes before what the user set.
    """
    # One broken plug-in of torch's own autoload group must not make `import torch` fail in there.
    own = {AUTOLOAD: "0", marked.NAME: mark}
    return {"OMP_NUM_THREADS": str(share_of_the_cores()), **os.environ, **given, **own}


def many_kernels(scale: str) -> dict[str, str]:
    """Return the environment in which oneDNN keeps a kernel for each shape of that scale, unless the user has set it.

    Scale tiny has 3,400 shapes, of which it keeps 1,024, and a kernel takes 0.4 ms to make: measured on two cores, with
    AMX, 14.0 s instead of 15.4 s, and 0.8 GiB more memory. At larger scales it is no gain.
    """
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    return {name: "4096"} if scale == "tiny" and name not in os.environ else {}


def share_of_the_cores(processes: int = 2) -> int:
    """Return the threads of one of several processes that compute at once: a worker and its judge, unless more.

    More threads than cores make all of them slower, since idle ones spin. Measured on two cores: 1.3 times for a
    worker at scale tiny, 1.3 times for its judge; two judges of recordings, beside other work, up to 4 times.
    """
    return max(1, (os.cpu_count() or 1) // processes)


class WorkerProcess:
    """A spawned worker. Closing it, in whatever state it is, ends it and the processes that it started."""

    def __init__(self, config: dict[str, Any], environment: Mapping[str, str]) -> None:
        here = str(Path(__file__).resolve().parents[2])
        path = [p for p in sys.path if p]
        self._mark = marked.new()
        self._popen = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(path if here in path else [*path, here])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(self._mark, environment),
            # A group of its own: Ctrl-C reaches only the parent, and whatever the worker starts ends with it.
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._stdin = self._popen.stdin
        _widen(self._popen.stdout)
        self._arrived: queue.SimpleQueue[tuple[dict[str, Any], Arrays] | str] = queue.SimpleQueue()
        self._tail = b""
        self.last_arrival = time.monotonic()
        for target, stream in ((self._read, self._popen.stdout), (self._drain, self._popen.stderr)):
            threading.Thread(target=target, args=(stream,), daemon=True).start()
        self.send(config)

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            try:
                if wire.skip_to_magic(stream):
                    while (message := wire.receive(stream)) is not None:
                        self.last_arrival = time.monotonic()
                        self._arrived.put(message)
            except (wire.WireError, OSError, ValueError) as error:
                self._arrived.put(f"sent a message that cannot be read ({plain(error, 100)})")
                return
        self._arrived.put("")

    def _drain(self, stream: IO[bytes]) -> None:
        with stream, contextlib.suppress(OSError, ValueError):
            while chunk := os.read(stream.fileno(), 1 << 16):
                self._tail = (self._tail + chunk)[-TAIL:]

    def send(self, header: dict[str, Any]) -> None:
        """Send a command. A worker that is gone is noticed by the next `receive`, not here."""
        with contextlib.suppress(OSError):
            wire.send(self._stdin, header)

    def receive(self, deadline: float) -> tuple[dict[str, Any], Arrays]:
        """Return the next message.

        Args:
            deadline: on the clock of `time.monotonic`.

        Raises:
            Died: the worker is gone, and all that it had sent has been received.
            TimedOut: the deadline passed.
        """
        while True:
            try:
                # In slices: a process that the worker left behind may hold the pipe open after its death.
                message = self._arrived.get(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except queue.Empty:
                if self._popen.poll() is not None:
                    with contextlib.suppress(queue.Empty):
                        late = self._arrived.get(timeout=1.0)
                        if not isinstance(late, str):
                            return late
                    raise Died(self._obituary("")) from None
                if time.monotonic() >= deadline:
                    raise TimedOut from None
                continue
            if isinstance(message, str):
                raise Died(self._obituary(message))
            return message

    def _obituary(self, why: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout=2.0)
        code = self._popen.returncode
        if why:
            how = why
        elif code is None:
            how = "closed its connection"
        elif code < 0:
            try:
                how = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was killed by signal {-code}"
        else:
            how = f"exited with status {code}"
        lines = self._tail.decode("utf-8", "replace").split("\n")
        words = next((plain(line, 200) for line in reversed(lines) if line.strip()), "")
        return f"the worker {how}" + (f"; its last words: {words}" if words else "")

    def close(self, grace: float = 0.0) -> None:
        """End the worker. With `grace`, it may close its device first and has that many seconds for it."""
        if grace and self._popen.poll() is None:
            self.send({"command": "close"})
            deadline = time.monotonic() + grace
            with contextlib.suppress(Died, TimedOut):
                while self.receive(deadline)[0].get("event") != "closed":
                    pass
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(self._popen.pid, signal.SIGKILL)
            else:
                self._popen.kill()
        self._popen.wait()
        marked.end(self._mark)
        with contextlib.suppress(OSError):
            self._stdin.close()


def _widen(pipe: IO[bytes]) -> None:
    """Let a pipe hold a megabyte where the system can: outputs need fewer turns of two busy processes."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
