# SPDX-License-Identifier: Apache-2.0
"""What the program finds when it imports torch: modules of the same names, in which the redirected APIs stand.

torch's own modules are not changed: who imports `torch` from outside of it gets a stand-in, which holds the same
attributes but for those of the table, and passes on what is set on it. Python's import decides by who imports.
Names that a module outside of torch imported before are replaced there, and put back in the end.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from hal.launch import api
from hal.launch.caller import inside, is_insider
from hal.launch.libraries import LIBRARIES
from hal.launch.patches import Patches

if TYPE_CHECKING:
    from hal.launch.redirection import Redirection


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
        from hal.launch.named import module

        return module, (self.__name__,)


class StandIns:
    """The stand-ins of one redirection, and what else the program gets in place of something of torch's.

    Args:
        replaced: for each module of torch's by name, what stands in for its attributes.
    """

    def __init__(self, replaced: Mapping[str, Mapping[str, Any]]) -> None:
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


_current: StandIns | None = None

_awaited: dict[tuple[str, str], list[Callable[[Any], None]]] = {}
"""What is to be done with a name of a module of torch's that is not loaded yet, as soon as it is there."""


_seen = -1
"""How many modules there were at the last look: functions of torch's import what is there on every call."""


def when_loaded(module: str, name: str, action: Callable[[Any], None]) -> None:
    """Call `action` with what stands under a name of a module, now or when somebody has imported it.

    Importing all of torch's distributed classes for a program that uses none would double its start.
    """
    _awaited.setdefault((module, name), []).append(action)
    _look()


def _look() -> None:
    global _seen
    _seen = len(sys.modules)
    for key in list(_awaited):
        module = sys.modules.get(key[0])
        # Not while it is being imported: the name may not be there yet, or stand for something else until the end.
        loading = module is not None and getattr(module.__spec__, "_initializing", False)
        found = None if module is None or loading else vars(module).get(key[1])
        if found is not None:
            for action in _awaited.pop(key, ()):
                action(found)
        if module is not None and key in _awaited:
            _seen = -1  # another import may give it the name


def seen(original: Any) -> Any:
    """Return what the program sees in place of something of torch's."""
    return original if _current is None else _current.of(original)


def _advise(error: ModuleNotFoundError, redirection: Redirection) -> None:
    """Add to the error of a missing library of CUDA kernels what a program can do without it here."""
    library = LIBRARIES.get(error.name or "")
    if library is not None and "; on " not in error.msg:
        error.msg += f"; on {redirection.device.info.id} there is none of its {library.what}: {library.instead}"


def stood_in() -> list[tuple[Any, Any]]:
    """Return what of torch's is replaced for the program, and by what."""
    return [] if _current is None else _current.pairs()


def install(stand_ins: StandIns, redirection: Redirection, patches: Patches) -> None:
    """Give stand-ins to everybody outside of torch: from now on by import, and where names were imported before."""
    global _current
    _current = stand_ins
    patches.on_undo(_forget)
    python_import, import_module = builtins.__import__, importlib.import_module

    def __import__(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: N807
        try:
            module = python_import(name, globals, locals, fromlist, level)
        except ModuleNotFoundError as error:
            _advise(error, redirection)
            raise
        if _awaited and len(sys.modules) != _seen:
            _look()
        if _current is None:
            return module
        if globals is None:  # `__import__("torch")` says nothing of who asks
            frame = sys._getframe(1)
            by_torch = inside(frame) or (frame.f_code.co_name == "<module>" and _evaluated_inside(frame))
        else:
            by_torch = is_insider(globals.get("__name__"))
        if by_torch:
            return module
        return _current.of(module)

    def import_module_(name: str, package: str | None = None) -> Any:
        module = import_module(name, package)
        if _awaited and len(sys.modules) != _seen:
            _look()
        if _current is None or is_insider(sys._getframe(1).f_globals.get("__name__")):
            return module
        return _current.of(module)

    patches.set(builtins, "__import__", __import__)
    patches.set(importlib, "import_module", import_module_)
    patches.on_undo(lambda: _exchange([(ours, original) for original, ours in stand_ins.pairs()]))
    _exchange(stand_ins.pairs())


def _evaluated_inside(frame: FrameType) -> bool:
    """Return whether a frame is that of a text which torch evaluates: the compiler does, with the program's globals."""
    return frame.f_back is not None and inside(frame.f_back)


def _forget() -> None:
    global _current
    _current = None
    _awaited.clear()


def _exchange(pairs: list[tuple[Any, Any]]) -> None:
    """Replace global names outside of torch that refer to one thing by another, by identity."""
    table: dict[int, tuple[Any, Any]] = {id(old): (old, new) for old, new in pairs}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or isinstance(module, StandIn) or is_insider(module.__name__):
            continue
        names = vars(module)
        if table.keys().isdisjoint(map(id, list(names.values()))):  # true of most, and quicker than looking at each
            continue
        for name, value in list(names.items()):
            found = table.get(id(value))
            # The compiler keeps modules for its guards among the globals of what it compiled, and wants those it put.
            if found is not None and found[0] is value and not name.startswith("__import_"):
                names[name] = found[1]


def redirected(entries: Mapping[str, api.Api], redirection: Any) -> dict[str, dict[str, Any]]:
    """Return what stands in for attributes of torch's modules, by module and attribute; later ones follow as they load.
    """
    replaced: dict[str, dict[str, Any]] = {}

    def ours(entry: api.Api, original: Any) -> Any:
        if entry.each:
            return Each(functools.partial(entry.answer, redirection))
        return entry.answer(redirection) if entry.makes else api.wrapped(entry, original, redirection)

    def late(entry: api.Api, original: Any) -> None:
        if _current is not None:
            _current.add(entry.module, {entry.attribute: ours(entry, original)})

    for entry in entries.values():
        module = sys.modules.get(entry.module)
        if module is None:
            when_loaded(entry.module, entry.attribute, functools.partial(late, entry))
            continue
        replaced.setdefault(entry.module, {})[entry.attribute] = ours(entry, getattr(module, entry.attribute, None))
    return replaced
