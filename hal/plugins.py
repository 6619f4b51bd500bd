# SPDX-License-Identifier: Apache-2.0
"""Finds plug-ins by entry point and loads them, one at a time, so that one bad plug-in costs only itself.

Loading a plug-in runs its code. The environment variable HAL_BACKENDS, a comma-separated list of names, limits
which ones are loaded.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import metadata

from hal.backend import PLUGIN_API, Backend
from hal.backend_name import fault_of
from hal.errors import Broken, ConfigError, DuplicateBackend, IncompatiblePlugin, PluginError, described

BACKENDS = "hal.backends"


@dataclass(frozen=True)
class Plugin:
    """A registered name with everyone who registers it; more than one owner makes it unusable.

    Attributes:
        name: of the backend.
        entry_points: what to load, one for each owner.
        owners: the distributions, as `name version`.
    """

    name: str
    entry_points: tuple[metadata.EntryPoint, ...]
    owners: tuple[str, ...]

    def claimants(self) -> str:
        """Return everyone who registers the name, with what each would load."""
        pairs = zip(self.owners, self.entry_points, strict=True)
        return " and by ".join(f"{owner} ({entry_point.value})" for owner, entry_point in pairs)


# No lock: two threads that miss a cache at once do the same work twice and agree on the result. One that is held
# while a plug-in is imported would let a slow import stop every other thread.
_loaded: dict[tuple[str, str], Backend] = {}
_found: dict[str, tuple[tuple[str, ...], tuple[Plugin, ...], tuple[str, ...]]] = {}


def registered(group: str = BACKENDS) -> tuple[Plugin, ...]:
    """Return what every installed distribution registers in a group, without loading it."""
    return _scanned(group)[0]


def unreadable(group: str = BACKENDS) -> tuple[str, ...]:
    """Return a sentence for each distribution whose entry points cannot be read: whatever it registers is lost."""
    return _scanned(group)[1]


def _scanned(group: str) -> tuple[tuple[Plugin, ...], tuple[str, ...]]:
    path = tuple(sys.path)
    if group not in _found or _found[group][0] != path:
        _found[group] = (path, *_scan(group))
    return _found[group][1:]


def _scan(group: str) -> tuple[tuple[Plugin, ...], tuple[str, ...]]:
    entry_points, problems = _entry_points(group)
    by_name: dict[str, dict[tuple[str, str], metadata.EntryPoint]] = {}
    for entry_point in entry_points:
        owner = "unknown" if entry_point.dist is None else " ".join(_identity(entry_point.dist))
        # One distribution may be seen twice, through an editable install and its build folder.
        by_name.setdefault(entry_point.name, {})[owner, entry_point.value] = entry_point
    plugins = [
        Plugin(name, tuple(found.values()), tuple(owner for owner, _ in found)) for name, found in by_name.items()
    ]
    return tuple(plugins), problems


def _entry_points(group: str) -> tuple[list[metadata.EntryPoint], tuple[str, ...]]:
    try:
        return list(metadata.entry_points(group=group)), ()
    except Exception:  # noqa: BLE001  one malformed file of any distribution makes this raise; which one, it does not say
        found, problems, seen = [], [], set()
    for dist in metadata.distributions():
        name, version = _identity(dist)
        if name in seen:  # the first on the path is the one that is installed
            continue
        seen.add(name)
        try:
            found += [entry_point for entry_point in dist.entry_points if entry_point.group == group]
        except Exception as error:  # noqa: BLE001  whatever its parser stumbles over
            problems.append(
                f"{name} {version}: its entry points cannot be read ({described(error)}), so nothing that "
                "it registers is found; try: reinstall it, or uninstall it"
            )
    return found, tuple(problems)


def _identity(dist: metadata.Distribution) -> tuple[str, str]:
    """Return name and version, or where it lies if it does not say."""
    try:
        name, version = dist.name, dist.version
    except Exception:  # noqa: BLE001  no metadata, or malformed ones; the exception differs between Pythons
        name, version = "", ""
    return (name, version) if name else (str(dist.locate_file("")), "(without a name)")


def allowed() -> tuple[Plugin, ...]:
    """Return the registered backends that HAL_BACKENDS admits; all of them if it is not set.

    Raises:
        ConfigError: HAL_BACKENDS is empty or names a backend that is not registered.
    """
    plugins = registered()
    setting = os.environ.get("HAL_BACKENDS")
    if setting is None:
        return plugins
    names = list(dict.fromkeys(name.strip() for name in setting.split(",") if name.strip()))
    known = {plugin.name: plugin for plugin in plugins}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"HAL_BACKENDS={setting!r} names {', '.join(map(repr, unknown)) if unknown else 'no backend'}",
            expected=f"a comma-separated list out of: {', '.join(sorted(known))}",
            hint="unset HAL_BACKENDS to admit every backend",
        )
    return tuple(known[name] for name in names)


def load(plugin: Plugin) -> Backend:
    """Import a plug-in's module and check what it offers; the result is cached.

    Raises:
        DuplicateBackend: two distributions register this name.
        IncompatiblePlugin: it was written for another major version of the interface.
        PluginError: the name is no name for a backend, or the entry point does not lead to a backend of this name.
        Broken: importing or making it raised; the original exception is the cause.
    """
    check_name(plugin)
    if len(plugin.entry_points) > 1:
        raise DuplicateBackend(
            f"backend {plugin.name!r} is registered by {plugin.claimants()}",
            hint="uninstall one of them; neither is used while both are there",
        )
    entry_point, owner = plugin.entry_points[0], plugin.owners[0]
    key = (plugin.name, f"{owner} {entry_point.value}")
    if key not in _loaded:
        try:
            found = entry_point.load()
            if isinstance(found, type) and issubclass(found, Backend):
                found = found()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plug-in does at import is its own fault alone
            raise Broken(
                f"importing {entry_point.value} of {owner} raised {described(error)}", device=plugin.name
            ) from error
        # Python imports a module once; of two objects made from a class by two threads, the first stays.
        _loaded.setdefault(key, _checked(found, plugin.name, f"{entry_point.value} of {owner}"))
    return _loaded[key]


def check_name(plugin: Plugin) -> None:
    """Refuse a name under which nobody could ask for the backend, before its code runs.

    Raises:
        PluginError: it is no name for a backend.
    """
    fault = fault_of(plugin.name)
    if fault is not None:
        raise PluginError(
            f"{plugin.claimants()} registers a backend as {plugin.name!r}, which {fault}",
            hint="uninstall it, or another name in its entry point and its class",
        )


def _checked(backend: object, name: str, where: str) -> Backend:
    if not isinstance(backend, Backend):
        raise PluginError(
            f"{where} is a {type(backend).__name__}", expected="an instance of hal.Backend, or the class itself"
        )
    version = getattr(backend, "plugin_api", None)
    # Not isinstance: True is an int.
    if not (isinstance(version, tuple) and len(version) == 2 and all(type(n) is int for n in version)):
        raise IncompatiblePlugin(
            f"{where} does not say for which plug-in interface it was written",
            expected=f"plugin_api = {PLUGIN_API}",
        )
    if version[0] != PLUGIN_API[0] or version[1] > PLUGIN_API[1]:
        raise IncompatiblePlugin(
            f"{where} was written for plug-in interface {version[0]}.{version[1]}",
            expected=f"{PLUGIN_API[0]}.0 to {PLUGIN_API[0]}.{PLUGIN_API[1]}",
            hint="a release of the plug-in or of moe-hal that fits the other",
        )
    if getattr(backend, "name", None) != name:
        raise PluginError(
            f"{where} calls itself {getattr(backend, 'name', None)!r} and is registered as {name!r}",
            expected="one name for both",
        )
    return backend
