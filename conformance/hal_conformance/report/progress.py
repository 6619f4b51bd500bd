# SPDX-License-Identifier: Apache-2.0
"""Progress of a long command on a terminal, with the time that is left; in a pipe, nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hal_conformance.report.table import console
from hal_conformance.text import plain


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on stderr, only if that is a terminal."""

    def __init__(self, total: int) -> None:
        err = console(stderr=True)
        self._progress = Progress(
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[red]}", style="bold red", markup=False),
            TextColumn("{task.description}", style="dim", markup=False),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total, red="")
        self._red = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, what: str, *, red: bool = False, by: int = 1) -> None:
        """Say that something is done, and whether it was red."""
        self._red += red
        shown = f"{self._red} red" if self._red else ""
        self._progress.update(self._task, advance=by, description=plain(what, 40), red=shown)
