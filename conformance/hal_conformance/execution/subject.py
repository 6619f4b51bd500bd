# SPDX-License-Identifier: Apache-2.0
"""What is under test: an implementation of the MoE operators on a device."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from hal.errors import ConfigError
from hal_conformance import manifest
from hal_conformance.execution import known, marked
from hal_conformance.text import plain

if TYPE_CHECKING:
    from hal.backend import DeviceInfo
    from hal.contract import Contract

SIMULATED = ("sim:h200", "sim:mi300x")
"""Simulated devices that are run beside the real ones if nobody names a device: one of each of two vendors."""

PORTABLE = "torch"
"""Name of the implementation that is always there: `hal.moe` in ordinary torch operators."""

_SETTINGS = (
    "TORCH_", "PYTORCH_", "OMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "HAL_", "CUDA_", "CUBLAS_",
    "CUBLASLT_", "CUDNN_", "NVIDIA_TF32_", "NCCL_", "TRITON_", "HIP_", "HSA_", "ROCBLAS_", "HIPBLASLT_", "MIOPEN_",
    "ASCEND_", "HCCL_", "TORCHINDUCTOR_", "NVTE_",
)  # fmt: skip
"""Prefixes of environment variables that change numbers; no other variable is written into a recording."""


@dataclass(frozen=True)
class Subject:
    """One implementation on one device.

    Attributes:
        device: what `hal.open_device` takes.
        impl: `torch`, or `module:object`.
        named: whether a user named this device, so that its absence is an error.
        beside: whether it is simulated, and run only because nobody named any device.
    """

    device: str
    impl: str = PORTABLE
    named: bool = True
    beside: bool = False

    def __str__(self) -> str:
        return self.device if self.impl == PORTABLE else f"{self.device} with {self.impl}"


def choose(named: Sequence[str], impls: Sequence[str], found: Iterable[DeviceInfo]) -> list[Subject]:
    """Return the subjects of a run, without repetitions.

    Args:
        named: the devices that a user named; `all` adds every listed device. Empty: every real device that is listed,
            and those in `SIMULATED`.
        impls: implementations; empty: the portable one.
        found: the devices that are listed here.

    Raises:
        ConfigError: an implementation is not written `module:object`.
    """
    for impl in impls:
        module, colon, path = impl.partition(":")
        if impl != PORTABLE and not (module and colon and path):
            raise ConfigError(f"cannot read --impl {plain(impl)!r}", expected="module:object")
    devices = {name: Subject(name) for name in named if name != "all"}
    if not named or "all" in named:
        for info in found:
            if "all" in named or not info.simulated or info.id in SIMULATED:
                beside = info.simulated and not named
                devices.setdefault(info.id, Subject(info.id, named=False, beside=beside))
    # What is simulated comes last: of it, what the CPU has shown is not run again.
    ordered = sorted(devices.values(), key=lambda subject: subject.device.startswith("sim:"))
    return [replace(subject, impl=impl) for subject in ordered for impl in dict.fromkeys(impls or (PORTABLE,))]


def unmet(required: Iterable[str], judged: Iterable[str]) -> list[str]:
    """Return the required globs that no judged device answers to."""
    ids = list(judged)
    return [glob for glob in required if not any(fnmatchcase(device, glob) for device in ids)]


def load_attribute(reference: str) -> Any:
    """Return what `module:object` names; the object may be dotted."""
    module, _, path = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def load_implementation(reference: str, folder: str) -> Any:
    """Return the implementation; a class is called without arguments.

    `folder` is searched first while the module is imported, and last from then on: what is imported already
    (torch, numpy, hal) cannot be shadowed by a file that happens to lie there.
    """
    if reference == PORTABLE:
        return load_attribute("hal_conformance.portable:portable")
    for module in ("torch", "numpy", "hal.moe"):
        importlib.import_module(module)
    sys.path.insert(0, folder)
    try:
        found = load_attribute(reference)
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)
    return found() if isinstance(found, type) else found


def describe(device: Any) -> dict[str, Any]:
    """Return what identifies an opened device and explains its numbers, as JSON values."""
    import torch

    import hal

    settings = {k: plain(v) for k, v in sorted(os.environ.items()) if k.startswith(_SETTINGS) and k != marked.NAME}
    versions = {
        "hal": hal.__version__,
        **manifest.libraries(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "uuid": manifest.uuid(device),
    }
    versions.update(device.versions())
    return {
        "info": device.info.as_json(),
        "contract": contract(device).as_json(),
        "versions": versions,
        "environment": settings,
        "flags": {**manifest.flags(), **known.readings(device)},
        "kernels": manifest.kernels(device),
        "changes": [plain(change) for change in device.changes],
    }


def contract(device: Any) -> Contract:
    """Return what an opened device is held to: what its backend declares, and where that is assumed, what is measured.

    A device that cannot be measured (a fault of its own, or one that has no products) is held to what is assumed.
    """
    declared: Contract = device.contract
    if declared.basis != "assumed":
        return declared
    from hal.probe.measured import measured_contract

    try:
        return measured_contract(device)
    except Exception as error:  # noqa: BLE001  a driver may raise anything
        return replace(
            declared, evidence=f"{declared.evidence}; not measured: {type(error).__name__}: {plain(error, 200)}"
        )
