# SPDX-License-Identifier: Apache-2.0
"""The beginning and the end of a process of `hal run`."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, NoReturn

from hal.errors import HalError
from hal.exit_status import exit_status
from hal.launch import adoption, report
from hal.launch.caller import is_ours
from hal.launch.settings import FIRST, Settings, from_environment


def start_first() -> None:
    """Open the device, or end the process: 2 if a setting is wrong, 3 if the device is absent or broken."""
    try:
        start()
    except HalError as error:
        report.discard(from_environment(os.environ))
        report.say(f"hal: {error}\n")
        # No exception may leave site's start: Python would print all of it and call it a fatal error.
        os._exit(exit_status(error))


def start() -> None:
    """Adopt the run's device in this process, and see to it that what happened is reported in the end."""
    settings = from_environment(os.environ)
    if settings is None or adoption.adopted() is not None:
        return
    first = os.environ.get(FIRST) == str(os.getpid())
    _hide_our_frames()
    adopted = adoption.adopt(settings.device, strict=settings.strict)
    _Ending(settings, adopted, first).register()


class _Ending:
    """Leaves this process's part of the report when it ends; the first process puts the parts together."""

    def __init__(self, settings: Settings, adopted: adoption.Adoption, first: bool) -> None:
        self._settings = settings
        self._adopted = adopted
        self._first = first
        self._process = os.getpid()

    def register(self) -> None:
        """Have it done at the end of this process, and of each that is forked from it."""
        atexit.register(self.write)
        os.register_at_fork(after_in_child=self._forked)
        end_now = os._exit

        def _exit(status: int) -> NoReturn:
            self.write()  # a program's last resort, and how multiprocessing ends its children: without atexit
            end_now(status)

        os._exit = _exit

    def _forked(self) -> None:
        redirection = self._adopted.redirection
        if redirection is not None:
            redirection.audit.clear()
        self._first = False
        self._process = os.getpid()

    def write(self) -> None:
        """Leave this process's part, once."""
        if self._process != os.getpid():
            return
        self._process = -1
        report.leave(self._settings, self._adopted.device.info, self._adopted.entries())
        if self._first:
            report.finish(self._settings)


# Tracebacks ----------------------------------------------------------------------------------------------------------


def _hide_our_frames() -> None:
    """Show in tracebacks what the program and torch did, and not how we were between them."""
    before, before_thread = sys.excepthook, threading.excepthook
    constructor = traceback.TracebackException.__init__

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, _pruned(error), error.__traceback__)

    def thread_excepthook(given: Any) -> None:
        if given.exc_value is not None:
            _pruned(given.exc_value)
            given = threading.ExceptHookArgs((given.exc_type, given.exc_value, given.exc_value.__traceback__,
                                              given.thread))  # fmt: skip
        before_thread(given)

    def taken_down(self: Any, kind: Any, error: Any, trace: TracebackType | None, **how: Any) -> None:
        constructor(self, kind, error, _without_ours(trace), **how)

    sys.excepthook, threading.excepthook = excepthook, thread_excepthook
    # Whatever is printed or passed on as text: by the program, by logging, from multiprocessing's and torch's workers.
    traceback.TracebackException.__init__ = taken_down  # type: ignore[assignment,method-assign]


def _pruned(error: BaseException) -> BaseException:
    """Take our frames out of an exception's traceback, and out of those of its causes."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        following.__traceback__ = _without_ours(following.__traceback__)
        following = following.__cause__ or following.__context__
    return error


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    kept = []
    while trace is not None:
        if not is_ours(trace.tb_frame.f_globals.get("__name__")):
            kept.append(trace)
        trace = trace.tb_next
    following = None
    for entry in reversed(kept):
        following = TracebackType(following, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return following
