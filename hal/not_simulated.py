# SPDX-License-Identifier: Apache-2.0
"""What a simulated device left to the CPU, and who wants to know of each such call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

Listener = Callable[[str, tuple[object, ...]], None]
"""Is told of an operator by name, and what it is given; empty where that is not known, as in code that is compiled."""


class NotSimulated:
    """Operators that a simulated device computed as a CPU does, and how often."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._listeners: list[Listener] = []

    def add(self, operator: str, operands: tuple[object, ...] = ()) -> None:
        """Count a call of an operator, once everyone who listens has heard of it and raised nothing."""
        for listener in self._listeners:
            listener(operator, operands)
        self._calls[operator] += 1

    def calls(self) -> dict[str, int]:
        """Return how often each was called so far."""
        return dict(self._calls)

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of each call, in the thread that makes it and before it is computed."""
        self._listeners.append(listener)
