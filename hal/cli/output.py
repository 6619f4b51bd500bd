# SPDX-License-Identifier: Apache-2.0
"""The two streams of a command: results go to stdout, all else to stderr. Either may be closed (`hal devices >&-`)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def on_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal; one that was closed is None."""
    return stream is not None and stream.isatty()


def plain(text: str, indent: int | None = None) -> str:
    """Return someone else's text with a question mark for each character that could control a terminal.

    Args:
        text: such as a driver's name for its product, or a plug-in's reason.
        indent: keep the lines, and indent all but the first by this many columns; None makes one line of them.
    """
    if indent is not None:
        return ("\n" + " " * indent).join(map(plain, text.splitlines()))
    return "".join(c if c.isprintable() else "?" for c in text)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send to stderr what plug-ins print inside the block, in Python or in a process that they start."""
    stdout, kept = sys.stdout, None
    if stdout is not None:
        stdout.flush()
        with contextlib.suppress(OSError):  # stdout is no file, or stderr is closed: only Python's prints are sent away
            kept = os.dup(1)
            os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            stdout.flush()  # of whoever kept the stream itself, such as a log handler
            os.dup2(kept, 1)
            os.close(kept)
