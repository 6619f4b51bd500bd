# SPDX-License-Identifier: Apache-2.0
"""Finds backends by entry point and loads them, one at a time, so that one bad plug-in costs only itself.

Loading a plug-in runs its code. The environment variable HAL_BACKENDS, a comma-separated list of names, limits
which ones are loaded.
"""

from __future__ import annotations

import os

from hal import entry_points
from hal.backend import PLUGIN_API, Backend
from hal.backend_name import fault_of
from hal.entry_points import Plugin
from hal.errors import Broken, ConfigError, DuplicateBackend, IncompatiblePlugin, PluginError, described

BACKENDS = "hal.backends"

# No lock: two threads that miss a cache at once do the same work twice and agree on the result. One that is held
# while a plug-in is imported would let a slow import stop every other thread.
_loaded: dict[tuple[str, str], Backend] = {}


def registered() -> tuple[Plugin, ...]:
    """Return every registered backend, without loading it."""
    return entry_points.registered(BACKENDS)


def unreadable() -> tuple[str, ...]:
    """Return a sentence for each distribution whose entry points cannot be read: whatever it registers is lost."""
    return entry_points.unreadable(BACKENDS)


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
