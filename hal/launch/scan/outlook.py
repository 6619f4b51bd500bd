# SPDX-License-Identifier: Apache-2.0
"""What will happen to a site on a backend. It knows what the runner knows: both read the same table."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import hal.launch.surface  # noqa: F401  fills the table
from hal import entry_points
from hal.launch.api import DOORS, TABLE, Verdict
from hal.launch.libraries import LIBRARIES
from hal.launch.replacements.finder import GROUP
from hal.launch.scan.sites import Known, Site

Backend = Literal["cuda", "rocm", "ppu", "ascend", "cpu"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_CALLED_CUDA = ("cuda", "rocm", "ppu")
"""Backends whose devices torch itself calls CUDA: nothing is redirected there."""

_NOT_IN_TORCH_NPU = frozenset(
    {
        "temperature", "power_draw", "clock_rate", "memory_usage", "list_gpu_processes", "_compile_kernel",
        "_create_jit_fn", "_create_multi_output_jit_fn", "CUDAPluggableAllocator", "current_solver_handle",
        "GdsFile", "gds_register_buffer", "gds_deregister_buffer", "tune_gemm_in_file", "mgpu_tune_gemm_in_file",
    }
)  # fmt: skip
"""What `torch.npu` of torch-npu 2.13.0 does not have of what would be handed on to it."""


@dataclass(frozen=True)
class Outlook:
    """What will happen.

    Attributes:
        verdict: `native`, the backend does it; `emulated`, something of equal meaning is done, or nothing where there
            is nothing to do; `refused`, an error says why not.
        note: what a user should know, or nothing.
    """

    verdict: Verdict
    note: str = ""


def known() -> dict[str, Known]:
    """Return the names that the runner redirects, as the finder of sites wants them."""
    found = {name: Known(asks=entry.belief) for name, entry in TABLE.items()}
    # Of the table's own, these are CUDA's only if they are given CUDA.
    return found | {name: Known(translates=True) for name in (*DOORS, "torch.Generator", "torch.load")}


@functools.lru_cache(maxsize=4096)
def outlook(api: str, backend: Backend) -> Outlook:
    """Return what will happen to a site's API on a backend."""
    if api.startswith("import:"):
        return _library(api.removeprefix("import:"), backend)
    if api.startswith("env:"):
        return _variable(api.removeprefix("env:"), backend)
    if api.startswith("file:"):
        return Outlook("native") if backend == "cuda" else Outlook("refused", _SOURCES.get(backend, _NO_CUDA))
    if backend in _CALLED_CUDA:
        return Outlook("native")
    entry = TABLE.get(api) or TABLE.get(api.rpartition(".")[0])  # or a method of one
    if entry is not None:
        if backend == "ascend" and entry.forwards and entry.attribute not in _NOT_IN_TORCH_NPU:
            return Outlook("native")
        if backend == "ascend" and api in _CLASSES_OF_TORCH_NPU:
            return Outlook("native")
        return Outlook(entry.verdict, entry.note)
    if door := DOORS.get(api):
        on_cpu = backend == "cpu" or door.verdict == "native"
        return Outlook(door.verdict, door.note) if on_cpu else Outlook("native")
    if api.startswith("torch.backends."):
        return Outlook("emulated", "kept, and read by nobody on this device")
    if any(name.startswith(f"{api}.") for name in (*TABLE, *DOORS)):
        return Outlook("native")  # a module that is handed on, such as torch.cuda itself
    if api.startswith(("torch.cuda.", "torch._C._cuda")):
        return Outlook("refused", "not redirected: torch's own answers, which finds no CUDA")
    return Outlook("native")


_CLASSES_OF_TORCH_NPU = frozenset(
    f"torch.cuda.{name}" for name in ("Event", "Stream", "ExternalStream", "CUDAGraph", "MemPool")
)
_NO_CUDA = "source code in CUDA, which this device does not run"
_SOURCES = {"rocm": "torch.utils.cpp_extension translates it by hipify, where it can",
            "ppu": "the vendor's compiler has to build it"}  # fmt: skip


def _library(name: str, backend: Backend) -> Outlook:
    library = LIBRARIES[name]
    if backend in library.runs_on:
        return Outlook("native")
    if backend == "ppu" and "cuda" in library.runs_on:
        return Outlook("native", "in a build of the vendor's")
    if any(plugin.name == library.name for plugin in entry_points.registered(GROUP)):
        return Outlook("emulated", f"{library.what}: what torch has an equivalent of, by torch's")
    return Outlook("refused", f"{library.what}: {library.instead}")


def _variable(name: str, backend: Backend) -> Outlook:
    if backend in _CALLED_CUDA or name == "CUDA_VISIBLE_DEVICES":
        return Outlook("native")
    return Outlook("emulated", "kept, and read by nobody on this device")


def outlooks(site: Site, backends: tuple[Backend, ...] = BACKENDS) -> dict[Backend, Outlook]:
    """Return what will happen to a site on each of some backends."""
    return {backend: outlook(site.api, backend) for backend in backends}
