# SPDX-License-Identifier: Apache-2.0
"""What a fault or a benign variation is, and how it is entered."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["fault", "benign"]


@dataclass(frozen=True)
class Variation:
    """One implementation of the operators that the suite must flag, or must not.

    Attributes:
        name: what follows `hal_conformance.faults:` in `--impl`.
        kind: whether it is wrong.
        what: one line.
        bug: a public report of the same, or "".
        make: returns the implementation.
        families: of the operators that it changes; only their cases are run. Empty: of all that it has.
    """

    name: str
    kind: Kind
    what: str
    bug: str
    make: Callable[[], Any]
    families: tuple[str, ...] = ()


VARIATIONS: dict[str, Variation] = {}
_Class = TypeVar("_Class", bound=type)


def _enter(kind: Kind, bug: str) -> Callable[[_Class], _Class]:
    def enter(cls: _Class) -> _Class:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        what = (cls.__doc__ or "").split("\n")[0].rstrip(".")
        if not what or name in VARIATIONS:
            raise TypeError(f"{cls.__name__} has no docstring, or its name is taken")
        VARIATIONS[name] = Variation(name, kind, what, bug, cls, getattr(cls, "families", ()))
        return cls

    return enter


def fault(bug: str = "") -> Callable[[_Class], _Class]:
    """Enter a class as a fault; its docstring says what is wrong, and its `families` which operators it changes."""
    return _enter("fault", bug)


def benign() -> Callable[[_Class], _Class]:
    """Enter a class as a benign variation; its docstring says what differs."""
    return _enter("benign", "")
