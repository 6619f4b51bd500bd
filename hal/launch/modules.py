# SPDX-License-Identifier: Apache-2.0
"""What the program finds when it imports torch: modules of the same names, in which the redirected APIs stand.

torch's own modules are not changed: who imports `torch` from outside of it gets a stand-in, which holds the same
attributes but for those of the table, and passes on what is set on it. Python's import decides by who imports.
Names that a module outside of torch imported before are replaced there, and put back in the end.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
from collections.abc import Mapping
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from hal.launch import api
from hal.launch.awaited import forget, look, when_loaded
from hal.launch.caller import inside, is_insider
from hal.launch.libraries import advice
from hal.launch.patches import Patches
from hal.launch.stand_ins import Each, StandIn, StandIns, current, put, seen

if TYPE_CHECKING:
    from hal.launch.redirection import Redirection


def _advise(error: ImportError, redirection: Redirection) -> None:
    """Add to the error of a missing library of CUDA kernels what a program can do without it here.

    A part that is missing of one that is installed has a path, and is another matter.
    """
    if error.path is None and "; on " not in error.msg:
        error.msg += advice(error.name or "", redirection.device.info.id)


def install(stand_ins: StandIns, redirection: Redirection, patches: Patches) -> None:
    """Give stand-ins to everybody outside of torch: from now on by import, and where names were imported before."""
    put(stand_ins)
    patches.on_undo(_forget)
    python_import, import_module = builtins.__import__, importlib.import_module

    def __import__(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: N807
        try:
            module = python_import(name, globals, locals, fromlist, level)
        except ImportError as error:
            _advise(error, redirection)
            raise
        look()
        if globals is None:  # `__import__("torch")` says nothing of who asks
            frame = sys._getframe(1)
            by_torch = inside(frame) or (frame.f_code.co_name == "<module>" and _evaluated_inside(frame))
        else:
            by_torch = is_insider(globals.get("__name__"))
        if by_torch:
            return module
        return seen(module)

    def import_module_(name: str, package: str | None = None) -> Any:
        module = import_module(name, package)
        look()
        return module if is_insider(sys._getframe(1).f_globals.get("__name__")) else seen(module)

    patches.set(builtins, "__import__", __import__)
    patches.set(importlib, "import_module", import_module_)
    patches.on_undo(lambda: _exchange([(ours, original) for original, ours in stand_ins.pairs()]))
    _exchange(stand_ins.pairs())


def _evaluated_inside(frame: FrameType) -> bool:
    """Return whether a frame is that of a text which torch evaluates: the compiler does, with the program's globals."""
    return frame.f_back is not None and inside(frame.f_back)


def _forget() -> None:
    put(None)
    forget()


def _exchange(pairs: list[tuple[Any, Any]]) -> None:
    """Replace global names outside of torch that refer to one thing by another, by identity.

    A module that has a stand-in keeps its own: what stands in for a function calls the function there.
    """
    table: dict[int, tuple[Any, Any]] = {id(old): (old, new) for old, new in pairs}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or isinstance(module, StandIn) or is_insider(module.__name__):
            continue
        if id(module) in table:
            continue
        names = vars(module)
        if table.keys().isdisjoint(map(id, list(names.values()))):  # true of most, and quicker than looking at each
            continue
        for name, value in list(names.items()):
            found = table.get(id(value))
            # The compiler keeps modules for its guards among the globals of what it compiled, and wants those it put.
            if found is not None and found[0] is value and not name.startswith("__import_"):
                names[name] = found[1]


def _read(entry: api.Api, redirection: Any) -> Any:
    """Return what stands under a name, and count who reads it: behind this function and the stand-in's own."""
    redirection.audit.count_outside(entry.name, sys._getframe(2), entry.belief)
    return entry.answer(redirection)


def redirected(entries: Mapping[str, api.Api], redirection: Any) -> dict[str, dict[str, Any]]:
    """Return what stands in for attributes of torch's modules, by module and attribute; others follow as they load."""
    replaced: dict[str, dict[str, Any]] = {}

    def ours(entry: api.Api, original: Any) -> Any:
        if entry.each or (entry.makes and entry.belief):
            return Each(functools.partial(_read, entry, redirection))
        return entry.answer(redirection) if entry.makes else api.wrapped(entry, original, redirection)

    def late(entry: api.Api, original: Any) -> None:
        in_force = current()
        if in_force is not None:
            in_force.add(entry.module, {entry.attribute: ours(entry, original)})

    for entry in entries.values():
        module = sys.modules.get(entry.module)
        if module is None:
            when_loaded(entry.module, entry.attribute, functools.partial(late, entry))
            continue
        replaced.setdefault(entry.module, {})[entry.attribute] = ours(entry, getattr(module, entry.attribute, None))
    return replaced
