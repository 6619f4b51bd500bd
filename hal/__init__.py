# SPDX-License-Identifier: Apache-2.0
"""Device portability for training Mixture-of-Experts models.

Importing this package imports neither torch nor numpy, opens nothing and changes nothing. Each public name is imported
when it is first used: every process of `hal run` imports this package before its program, which waits for it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hal.allocator_plan import AllocatorPlan
    from hal.backend import PLUGIN_API, Backend, Claim, DeviceInfo, Discovery, Specificity
    from hal.contract import Contract
    from hal.device import Device
    from hal.errors import (
        Absent,
        Broken,
        CollectiveError,
        CollectiveTimeout,
        ConfigError,
        DeviceClosed,
        DeviceConflict,
        DeviceError,
        DuplicateBackend,
        HalError,
        IncompatiblePlugin,
        OutOfMemoryError,
        PluginError,
        ShapeError,
        UnknownDevice,
        Unsupported,
        UnsupportedDtype,
        UnsupportedOperation,
        UnsupportedPrecision,
    )
    from hal.explanation import Explanation, explain
    from hal.facets import Facets
    from hal.launch.adoption import Adoption, adopt, release
    from hal.memory_stats import MemoryStats
    from hal.registry import list_devices, open_device, plan_environment
    from hal.support import Support

__version__ = "0.1.0"

__all__ = [
    "PLUGIN_API",
    "Absent",
    "Adoption",
    "AllocatorPlan",
    "Backend",
    "Broken",
    "Claim",
    "CollectiveError",
    "CollectiveTimeout",
    "ConfigError",
    "Contract",
    "Device",
    "DeviceClosed",
    "DeviceConflict",
    "DeviceError",
    "DeviceInfo",
    "Discovery",
    "DuplicateBackend",
    "Explanation",
    "Facets",
    "HalError",
    "IncompatiblePlugin",
    "MemoryStats",
    "OutOfMemoryError",
    "PluginError",
    "ShapeError",
    "Specificity",
    "Support",
    "UnknownDevice",
    "Unsupported",
    "UnsupportedDtype",
    "UnsupportedOperation",
    "UnsupportedPrecision",
    "adopt",
    "explain",
    "list_devices",
    "open_device",
    "plan_environment",
    "release",
]

_HOMES = {
    "hal.allocator_plan": "AllocatorPlan",
    "hal.backend": "PLUGIN_API Backend Claim DeviceInfo Discovery Specificity",
    "hal.contract": "Contract",
    "hal.device": "Device",
    "hal.explanation": "Explanation explain",
    "hal.facets": "Facets",
    "hal.launch.adoption": "Adoption adopt release",
    "hal.memory_stats": "MemoryStats",
    "hal.registry": "list_devices open_device plan_environment",
    "hal.support": "Support",
}
"""Where the names are defined, as the imports above tell type checkers; errors are in `hal.errors`."""

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = next((module for module, names in _HOMES.items() if name in names.split()), "hal.errors")
        globals()[name] = found = getattr(import_module(home), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
