# SPDX-License-Identifier: Apache-2.0
"""Device portability for training Mixture-of-Experts models.

Importing this package imports neither torch nor numpy, opens nothing and changes nothing.
"""

from hal.backend import PLUGIN_API, Backend, Claim, DeviceInfo, Discovery, Specificity
from hal.contract import Contract
from hal.device import Device, Facets
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
from hal.explain import Explanation, explain
from hal.launch.adoption import Adoption, adopt, release
from hal.memory import AllocatorPlan, MemoryStats
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
