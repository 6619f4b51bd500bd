# SPDX-License-Identifier: Apache-2.0
"""What explains numbers besides the card: libraries, flags, and the kernels of a product, where these can be known."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

from hal_conformance.text import plain

DTYPES = ("float32", "bfloat16", "float16")
_LIBRARY = re.compile(
    r"Math Kernel Library|MKL-DNN|cuDNN|CuDNN|MIOpen|Magma|OpenMP|HIP Runtime|CUDA Runtime|CPU capability"
)


def libraries() -> dict[str, str]:
    """Return the versions of what computes on the host, and of what torch was built with."""
    import torch

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "ml_dtypes", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    config = torch.__config__.show()
    for line in config.splitlines():
        text = line.strip(" -")
        if (match := _LIBRARY.search(text)) and "Build settings" not in text:
            found[f"build.{match.group().replace(' ', '_').lower()}"] = plain(text, 100)
    if commit := re.search(r"COMMIT_SHA=(\w+)", config):
        found["torch_commit"] = commit.group(1)
    return found


_MODULES = {
    "transformers": "transformers", "torchtitan": "torchtitan", "megatron": "megatron-core",
    "transformer_engine": "transformer-engine", "apex": "apex", "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel", "grouped_gemm": "grouped-gemm",
}  # fmt: skip
"""Libraries that an implementation may compute with: module to distribution."""


def implementation(loaded: Any, reference: str) -> dict[str, str]:
    """Return what tells one implementation of a name from another: its distribution's version, or its source's digest.

    Args:
        loaded: the implementation.
        reference: by which it was named, `module:object`: that module is where an adapter is put round something.
    """
    found = {}
    for module, distribution in _MODULES.items():
        if module in sys.modules:
            found[module] = _said(lambda name=distribution: version(name))  # type: ignore[misc]
    kind = loaded if isinstance(loaded, (type, ModuleType)) else type(loaded)
    own = kind.__name__ if isinstance(kind, ModuleType) else kind.__module__
    known = {"hal", "hal_conformance", "torch", *sys.stdlib_module_names}
    modules = [m for m in dict.fromkeys((reference.partition(":")[0], own)) if m.partition(".")[0] not in known]
    distributions = packages_distributions() if modules else {}  # reads the metadata of all that is installed
    for module in modules:
        for name in distributions.get(module.partition(".")[0], []):
            found[f"implementation.{module}"] = f"{name} {version(name)}"
        with contextlib.suppress(OSError, TypeError):  # in an archive, or gone
            file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[f"implementation.{module}.source"] = f"{file.name} {digest[:16]}"
    return found


def uuid(device: Any) -> str | None:
    """Return what the driver calls a card of its own by; None where there is no such thing, as of a CPU."""
    import torch

    where = device.torch_device
    try:
        properties = torch.get_device_module(where).get_device_properties(where)
    except (AttributeError, RuntimeError, AssertionError, NotImplementedError, TypeError):
        return None
    found = getattr(properties, "uuid", None)
    return None if found is None else plain(found, 100)


def flags() -> dict[str, str]:
    """Return torch's switches that change numbers, as they are now."""
    import torch

    b: Any = torch.backends
    readings: dict[str, Callable[[], Any]] = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
        "default_dtype": torch.get_default_dtype,
        "cudnn.deterministic": lambda: b.cudnn.deterministic,
        "cudnn.benchmark": lambda: b.cudnn.benchmark,
        "cudnn.enabled": lambda: b.cudnn.enabled,
        "mkldnn.enabled": lambda: b.mkldnn.enabled,
        "matmul.bf16_reduced_reduction": lambda: b.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "matmul.fp16_reduced_reduction": lambda: b.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "matmul.fp16_accumulation": lambda: b.cuda.matmul.allow_fp16_accumulation,
        "flush_denormal": lambda: bool(torch.tensor([2.0**-140]).mul(1.0).eq(0.0)),  # which torch does not say
        "blas_library": lambda: b.cuda.preferred_blas_library(),
    }
    # torch 2.9 and later have `fp32_precision`, earlier ones `allow_tf32`; reading the old one after the new one
    # was set raises.
    if hasattr(b, "fp32_precision"):
        readings |= {
            "fp32_precision": lambda: b.fp32_precision,
            "fp32_precision.cuda.matmul": lambda: b.cuda.matmul.fp32_precision,
            "fp32_precision.cudnn": lambda: b.cudnn.fp32_precision,
            "fp32_precision.mkldnn.matmul": lambda: b.mkldnn.matmul.fp32_precision,
        }
    else:
        readings |= {
            "matmul.allow_tf32": lambda: b.cuda.matmul.allow_tf32,
            "cudnn.allow_tf32": lambda: b.cudnn.allow_tf32,
            "matmul.precision": torch.get_float32_matmul_precision,
        }
    return {name: _said(reading) for name, reading in readings.items()}


def _said(reading: Callable[[], Any]) -> str:
    try:
        return plain(reading(), 4000)
    except Exception as error:  # noqa: BLE001  a switch that this torch or this build does not have
        return plain(f"cannot be read ({type(error).__name__})", 100)


def kernels(device: Any) -> dict[str, str]:
    """Return the kernels of one product in each dtype, as the profiler of torch names them; empty where it names none.

    A library chooses a kernel by card, shape and version, and two kernels add up in another order. Only CUDA and ROCm
    report kernels here. What an implementation of its own launches is not asked: it would have to run under a profiler.
    """
    if getattr(device.torch_device, "type", "") != "cuda":
        return {}
    return {name: _said(lambda name=name: _product_kernels(device, name)) for name in DTYPES}  # type: ignore[misc]


def _product_kernels(device: Any, dtype: str) -> str:
    import torch
    from torch.profiler import ProfilerActivity, profile

    a, b = (torch.ones(128, 128, dtype=getattr(torch, dtype), device=device.torch_device) for _ in range(2))
    a @ b  # what a first call sets up is no part of it
    device.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        a @ b
        device.synchronize()
    names = {event.name for event in seen.events() if str(event.device_type) != "DeviceType.CPU"}
    return ", ".join(sorted(names)) or "the profiler names none"
