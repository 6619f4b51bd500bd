# SPDX-License-Identifier: Apache-2.0
"""What is to be done with names of torch's modules that the program has not loaded yet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_awaited: dict[tuple[str, str], list[Callable[[Any], None]]] = {}
"""By module and name: what is to be done with what stands there, as soon as it does."""
_looked_at = -1
"""How many modules there were at the last look: functions of torch's import what is there on every call."""


def when_loaded(module: str, name: str, action: Callable[[Any], None]) -> None:
    """Call `action` with what stands under a name of a module, now or when somebody has imported it.

    Importing all of torch's distributed classes for a program that uses none would double its start.
    """
    _awaited.setdefault((module, name), []).append(action)
    _look()


def look() -> None:
    """Act on what an import may have brought."""
    if _awaited and len(sys.modules) != _looked_at:
        _look()


def forget() -> None:
    """Wait for nothing any more."""
    _awaited.clear()


def _look() -> None:
    global _looked_at
    _looked_at = len(sys.modules)
    for key in list(_awaited):
        module = sys.modules.get(key[0])
        # Not while it is being imported: the name may not be there yet, or stand for something else until the end.
        loading = module is not None and getattr(module.__spec__, "_initializing", False)
        found = None if module is None or loading else vars(module).get(key[1])
        if found is not None:
            for action in _awaited.pop(key, ()):
                action(found)
        if module is not None and key in _awaited:
            _looked_at = -1  # another import may give it the name
