# SPDX-License-Identifier: Apache-2.0
"""Finds replacements for libraries that nobody installed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dis import opmap
from types import ModuleType
from typing import Any

from hal import entry_points
from hal.launch import api
from hal.launch.caller import is_insider
from hal.launch.libraries import advice
from hal.launch.patches import Patches

GROUP = "hal.replacements"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last on `sys.meta_path`: a library that is installed is never replaced.

    Attributes:
        registers: False: what it finds registers no entry points.
    """

    registers = False

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        source = _source(fullname)
        found = None if source is None else importlib.util.find_spec(source)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin=source, is_package=is_package)

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """Yield what `importlib.metadata` is to know: programs ask it for a library's version before they use one."""
        from hal.launch.replacements.distribution import Replaced

        asked = getattr(context, "name", None)
        for plugin in entry_points.registered(GROUP):
            library = plugin.name
            if asked is not None and _normal(asked) != _normal(library):
                continue
            spec = importlib.util.find_spec(library)
            if spec is not None and spec.loader is self:
                version = getattr(importlib.import_module(str(spec.origin)), "__version__", None)
                if version is not None:
                    yield Replaced(library, version)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """A new module each time."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with what the replacement has."""
        assert module.__spec__ is not None
        source = importlib.import_module(str(module.__spec__.origin))
        public = {name: value for name, value in vars(source).items()
                  if not name.startswith("__") and not _is_of_ours(value)}  # fmt: skip
        vars(module).update(public, __doc__=source.__doc__)
        version = getattr(source, "__version__", None)
        if version is not None:
            vars(module)["__version__"] = version
        vars(module).setdefault("__getattr__", _missing(module))
        self.made.append(module.__name__)


def _missing(module: ModuleType) -> Callable[[str], Any]:
    """Return what tells a program that asks for a name which the replacement has not."""

    def missing(name: str) -> Any:
        frame, what = sys._getframe(1), module.__name__
        if frame.f_code.co_code[frame.f_lasti] != opmap["IMPORT_FROM"]:  # `from apex import amp`
            raise AttributeError(f"module {what!r} has no attribute {name!r}", name=name, obj=module)
        active = api.active()
        device = "this device" if active is None else active.device.info.id
        raise ImportError(f"cannot import name {name!r} from {what!r}{advice(f'{what}.{name}', device)}", name=what)

    return missing


def _is_of_ours(value: Any) -> bool:
    """Return whether a replacement uses this itself: `from flash_attn import *` would hand it to the program."""
    home = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
    if home.startswith("hal.launch.replacements."):
        return home == __name__
    return home.partition(".")[0] in ("hal", "torch", "typing", "__future__", "collections")


def _normal(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def _source(fullname: str) -> str | None:
    """Return the name of the module that stands in, or None."""
    library, _, rest = fullname.partition(".")
    if is_insider(library):
        return None
    for plugin in entry_points.registered(GROUP):
        if plugin.name == library:
            return ".".join(filter(None, (plugin.entry_points[0].value.partition(":")[0], rest)))
    return None


def install(patches: Patches) -> None:
    """Let replacements be found, until the end."""
    finder = Finder()
    sys.meta_path.append(finder)

    def remove() -> None:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)

    patches.on_undo(remove)


def stands_in(name: str, what: str) -> None:
    """Tell the report that a library's function was called and something else ran: a change of meaning.

    Raises:
        UnsupportedOperation: in strict mode.
    """
    redirection: Any = api.active()
    if redirection is None:
        return
    from torch.compiler import is_dynamo_compiling

    if is_dynamo_compiling():
        from hal.launch.surface.compiler import traced

        traced.note("change", name, what)
    else:
        redirection.change(name, what)


def refuse(name: str, why: str) -> Exception:
    """Return the error for what the replacement does not do."""
    redirection: Any = api.active()
    if redirection is None:
        return RuntimeError(f"{name}: {why}")
    error: Exception = redirection.refuse(name, why)
    return error
