# SPDX-License-Identifier: Apache-2.0
"""Attributes that are replaced for a while, and put back exactly as they were."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("hal")

_NONE = object()


class Patches:
    """A list of replaced attributes, and of other things to undo, undone in reverse."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.methods: list[tuple[Any, Any]] = []
        """What was replaced among the methods of classes, and what is there instead: for names that hold one."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of a module or a class.

        What a class inherits stays its base's: `undo` deletes the replacement, so that the inherited one shows again.
        """
        had = vars(owner).get(name, _NONE)
        if isinstance(owner, type) and not name.startswith("__"):
            method = getattr(owner, name, None)
            if callable(method) and callable(value):
                self.methods.append((method, value))

        def undo() -> None:
            if vars(owner).get(name, _NONE) is not value:
                # Somebody replaced it after us, and may hold what was here then: theirs, and it stays.
                log.warning("hal leaves %s.%s as somebody else has set it", getattr(owner, "__name__", owner), name)
            elif had is _NONE:
                delattr(owner, name)
            else:
                setattr(owner, name, had)

        setattr(owner, name, value)
        self._stack.callback(undo)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Call `action` when everything that was replaced after this is back."""
        self._stack.callback(action)

    def undo(self) -> None:
        """Put everything back; a failure does not keep the rest from it. Calling it again does nothing."""
        self._stack.close()
