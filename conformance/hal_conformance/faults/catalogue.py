# SPDX-License-Identifier: Apache-2.0
"""What a fault or a benign variation is, and how it is entered."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hal_conformance.faults.parts import Parts

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


_FAMILIES = {
    "route": "router", "dispatch": "dispatch", "experts": "experts", "combine": "combine", "aux_loss": "losses",
    "z_loss": "losses", "layer": "layer",
}  # fmt: skip


def families_of(cls: type, kind: Kind) -> tuple[str, ...]:
    """Return the families of the operators that an implementation changes; nothing if that cannot be told.

    A class says so itself (`families`), or is made of `Parts`, whose layer changes with every operator; training steps
    show nothing of a fault that a layer does not.
    """
    said: tuple[str, ...] = getattr(cls, "families", ())
    if said or not issubclass(cls, Parts):
        return said
    changed = {family: None for name, family in _FAMILIES.items() if getattr(cls, name) is not getattr(Parts, name)}
    whole = ("layer", "determinism") if kind == "fault" else ("layer", "determinism", "trajectory")
    return tuple(dict.fromkeys((*changed, *whole))) if changed else ()


VARIATIONS: dict[str, Variation] = {}
_Class = TypeVar("_Class", bound=type)


def _enter(kind: Kind, bug: str) -> Callable[[_Class], _Class]:
    def enter(cls: _Class) -> _Class:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        what = (cls.__doc__ or "").split("\n")[0].rstrip(".")
        if not what or name in VARIATIONS:
            raise TypeError(f"{cls.__name__} has no docstring, or its name is taken")
        VARIATIONS[name] = Variation(name, kind, what, bug, cls, families_of(cls, kind))
        return cls

    return enter


def fault(bug: str = "") -> Callable[[_Class], _Class]:
    """Enter a class as a fault; its docstring says what is wrong, and its `families` which operators it changes."""
    return _enter("fault", bug)


def benign() -> Callable[[_Class], _Class]:
    """Enter a class as a benign variation; its docstring says what differs."""
    return _enter("benign", "")
