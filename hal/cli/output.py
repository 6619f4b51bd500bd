# SPDX-License-Identifier: Apache-2.0
"""The two streams of a command: results go to stdout, all else to stderr. Either may be closed (`hal devices >&-`)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


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


def console(**options: Any) -> Console:
    """Return rich's console. Where nobody reads any more it raises, as print does; rich's own exits with status 1."""
    from rich.console import Console

    class Raising(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Raising(**options)


def say(message: str, **style: Any) -> None:
    """Write a line to stderr. Where that is full or gone, the exit status still says what it says."""
    import click

    with contextlib.suppress(OSError):
        click.secho(message, err=True, **style)


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
