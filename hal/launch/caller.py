# SPDX-License-Identifier: Apache-2.0
"""Who calls: torch's own modules and ours see the true device, everybody else sees CUDA.

A module is known by its name, `__name__` of the calling frame's globals. What runs in C has no frame, so that the
caller of `getattr`, `map` or `operator.attrgetter` counts.
"""

from __future__ import annotations

import functools
from types import FrameType

_INSIDERS = frozenset({"torch", "functorch", "torchgen", "hal", "hal_conformance",
                       "hal_cpu", "hal_cuda", "hal_rocm", "hal_ascend", "hal_ppu"})  # fmt: skip
_known: dict[object, bool] = {}


def is_insider(name: object) -> bool:
    """Return whether a module of this name sees the true device: torch's and ours do, torchvision's do not."""
    inside = _known.get(name)
    if inside is None:
        first = name.partition(".")[0] if isinstance(name, str) else ""
        inside = first in _INSIDERS or (first.startswith("hal_") and first in _backends())
        if len(_known) < _MOST_KNOWN:
            _known[name] = inside
    return inside


def is_ours(name: object) -> bool:
    """Return whether a module of this name is this project's or a backend's."""
    return isinstance(name, str) and not name.startswith(_TORCH) and is_insider(name)


_TORCH = ("torch", "functorch")


@functools.cache
def _backends() -> frozenset[str]:
    """Return the packages of all backends that are registered, other distributions' included."""
    from hal import entry_points
    from hal.plugins import BACKENDS

    found = (entry.value for plugin in entry_points.registered(BACKENDS) for entry in plugin.entry_points)
    return frozenset(value.partition(":")[0].partition(".")[0].strip() for value in found)


_MOST_KNOWN = 100_000
"""Names are remembered, but not without end: a program may run code under names that it makes up."""


def inside(frame: FrameType) -> bool:
    """Return whether the code of a frame sees the true device."""
    name = frame.f_globals.get("__name__")
    if name is None:
        return _is_of_a_graph(frame)
    known = _known.get(name)  # looked up here as well: this is asked whenever torch asks a tensor for its device
    return is_insider(name) if known is None else known


def _is_of_a_graph(frame: FrameType) -> bool:
    """Return whether code that belongs to no module is of a graph that the compiler made, which holds true devices.

    A graph that the program traced itself (`torch.fx`) holds what the program wrote. A text that torch evaluates, as it
    does for guards, is torch's.
    """
    if frame.f_code.co_filename == "<string>":
        return frame.f_code.co_name == "<module>" and frame.f_back is not None and inside(frame.f_back)
    if not frame.f_code.co_filename.startswith("<eval_with_key>"):
        return ".py:codegen(" in frame.f_code.co_filename
    return "dynamo_flat_name_to_original_fqn" in getattr(frame.f_locals.get("self"), "meta", ())


def outside(frame: FrameType | None) -> FrameType | None:
    """Return the nearest frame, from this one outwards, that belongs to the script or to a library of its own.

    Python's own wrappers belong to neither. None where torch acts by itself: what its modules do as they are imported.
    """
    while frame is not None:
        if inside(frame):
            if frame.f_code.co_name == "<module>":
                return None
        elif frame.f_globals.get("__name__") not in _WRAPPERS:
            return frame
        frame = frame.f_back
    return None


_WRAPPERS = frozenset({None, "contextlib", "copy", "functools", "typing_extensions", "warnings"})
"""Modules whose functions stand between the program and torch's: decorators such as `deprecated`, contexts, copies.

Code that belongs to no module is generated, as torch's for a graph is.
"""
