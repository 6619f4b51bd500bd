# SPDX-License-Identifier: Apache-2.0
"""What the program sees in place of torch's modules and functions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Each:
    """What stands under a name, made anew each time that the name is read."""

    make: Callable[[], Any]


class StandIn(ModuleType):
    """A module in place of one of torch's.

    Its dictionary is a copy, so that reading an attribute costs what it costs in any module; what torch adds to its
    own later is found there, and what the program sets goes there, too.
    """

    def __init__(self, original: ModuleType, replaced: Mapping[str, Any]) -> None:
        super().__init__(original.__name__, original.__doc__)
        vars(self).update(vars(original))
        vars(self)["_hal_original"] = original
        vars(self)["_hal_replaced"] = frozenset()
        vars(self)["_hal_each"] = {}
        self.replace(replaced)

    def replace(self, replaced: Mapping[str, Any]) -> None:
        """Let something else stand under more names."""
        for name, ours in replaced.items():
            if isinstance(ours, Each):
                vars(self).pop(name, None)
                vars(self)["_hal_each"][name] = ours
            else:
                vars(self)[name] = ours
        vars(self)["_hal_replaced"] |= frozenset(replaced)

    def __getattr__(self, name: str) -> Any:
        each = vars(self)["_hal_each"].get(name)
        if each is not None:
            return each.make()
        return getattr(vars(self)["_hal_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value
        if name not in vars(self)["_hal_replaced"] and name != "__class__":
            setattr(vars(self)["_hal_original"], name, value)

    def __delattr__(self, name: str) -> None:
        vars(self).pop(name, None)
        if name not in vars(self)["_hal_replaced"] and hasattr(vars(self)["_hal_original"], name):
            delattr(vars(self)["_hal_original"], name)

    def __dir__(self) -> list[str]:
        own = {"_hal_original", "_hal_replaced", "_hal_each"}
        return sorted({*vars(self), *dir(vars(self)["_hal_original"])} - own)

    def __reduce__(self) -> tuple[Any, ...]:
        return seen_module, (self.__name__,)


class StandIns:
    """The stand-ins of one redirection, and what else the program gets in place of something of torch's.

    Args:
        replaced: for each module of torch's by name, what stands in for its attributes.
        methods: of torch's classes, and what they were replaced by.
    """

    def __init__(self, replaced: Mapping[str, Mapping[str, Any]], methods: Iterable[tuple[Any, Any]] = ()) -> None:
        self._by_original: dict[int, tuple[Any, Any]] = {}
        made: dict[str, StandIn] = {}
        # The innermost first: the stand-in for torch holds that for torch.cuda.
        names = {parent for name in replaced for parent in _with_parents(name)}
        for name in sorted(names, key=lambda name: -name.count(".")):
            original = sys.modules.get(name)
            if original is None:
                continue
            inner = {child.rpartition(".")[2]: module for child, module in made.items()
                     if child.rpartition(".")[0] == name}  # fmt: skip
            made[name] = StandIn(original, {**replaced.get(name, {}), **inner})
            self._enter(original, made[name])
        for name, attributes in replaced.items():
            for attribute, ours in attributes.items():
                if name in made and attribute in vars(sys.modules[name]):
                    self._enter(vars(sys.modules[name])[attribute], ours)
        for method, ours in methods:
            self._enter(method, ours)

    def _enter(self, original: Any, ours: Any) -> None:
        if not isinstance(ours, Each) and (isinstance(original, (ModuleType, type)) or callable(original)):
            self._by_original[id(original)] = (original, ours)

    def add(self, name: str, replaced: Mapping[str, Any]) -> None:
        """Let something else stand in for attributes of one more module, which was loaded only now; or of one again."""
        original = sys.modules[name]
        made = self.of(original)
        if isinstance(made, StandIn):
            made.replace(replaced)
        else:
            made = StandIn(original, replaced)
            self._enter(original, made)
            parent, _, child = name.rpartition(".")
            if parent:
                self.add(parent, {child: made})
        for attribute, ours in replaced.items():
            self._enter(vars(original).get(attribute), ours)

    def of(self, original: Any) -> Any:
        """Return what stands in for something of torch's; anything else as it is."""
        found = self._by_original.get(id(original))
        return original if found is None else found[1]

    def pairs(self) -> list[tuple[Any, Any]]:
        """Return all originals, and what stands in for each."""
        return list(self._by_original.values())


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


# Those of the one redirection of this process ---------------------------------------------------------------------

_current: StandIns | None = None


def current() -> StandIns | None:
    """Return those in force, or None."""
    return _current


def put(stand_ins: StandIns | None) -> None:
    """Put stand-ins in force; None ends it."""
    global _current
    _current = stand_ins


def seen(original: Any) -> Any:
    """Return what the program sees in place of something of torch's."""
    return original if _current is None else _current.of(original)


def seen_module(name: str) -> Any:
    """Return what this process sees as a module of torch's; a stand-in is pickled as a call of this."""
    __import__(name)  # a statement's own way: in a child of a run it is what starts the redirection
    return seen(sys.modules[name])


def stood_in() -> list[tuple[Any, Any]]:
    """Return what of torch's is replaced for the program, and by what."""
    return [] if _current is None else _current.pairs()
