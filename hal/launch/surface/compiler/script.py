# SPDX-License-Identifier: Apache-2.0
"""torch.jit.script: scripted code names torch's functions, and finds them by identity, ours as well as torch's own.

What scripted code asks of a tensor's device it asks without Python, and is told the true one: that is a change of
meaning, which the report names. Where it moves a tensor no function of Python's is met either: what was compiled is
rewritten to move to the true device, and to copy, where on a CPU the host could not be told from the device. A device
that it is called with is translated on the way in.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

from hal.launch import api as state
from hal.launch.api import api
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.stand_ins import stood_in
from hal.launch.surface.tensors.device_class import DeviceType

_ASKS = re.compile(r"prim::(device|is_cuda|type)\b|aten::(is_cuda|get_device)\b")


def install(redirection: Redirection, patches: Patches) -> None:
    """Let the compiler of scripts know what stands in for torch's functions, once it asks."""
    import torch
    import torch.jit._builtins as builtins
    from torch.jit import annotations

    original: Any = builtins._get_builtin_table
    added: dict[int, Any] = {}

    def table() -> dict[int, str]:
        known: dict[int, str] = original()
        if not added:
            for own, ours in stood_in():
                name = known.get(id(own))
                if name is not None:
                    known[id(ours)], added[id(ours)] = name, ours
        return known

    def forget() -> None:
        known = original() if added else {}
        for key in added:
            known.pop(key, None)

    patches.on_undo(forget)
    patches.set(builtins, "_get_builtin_table", table)
    patches.set(annotations, "try_ann_to_type", _annotated(annotations.try_ann_to_type))
    for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod):
        patches.set(kind, "__call__", _called(kind.__call__, torch.device))


def _annotated(original: Any) -> Any:
    """Return torch's function that reads an annotation, which knows its own class of devices by identity."""

    def try_ann_to_type(ann: Any, *args: Any, **kwargs: Any) -> Any:
        return original(ann.original if isinstance(ann, DeviceType) else ann, *args, **kwargs)

    return try_ann_to_type


def _called(original: Any, device: type) -> Any:
    """Return a call of something scripted that translates the devices which it is given."""

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        r = state._active
        if r is not None:
            args = tuple(r.translate(given) if isinstance(given, device) else given for given in args)
            kwargs = {name: r.translate(given) if isinstance(given, device) else given
                      for name, given in kwargs.items()}  # fmt: skip
        return original(self, *args, **kwargs)

    return call


# Moves in what was compiled ------------------------------------------------------------------------------------------


def _functions() -> dict[str, Any]:
    """Return all functions that are compiled, by name."""
    import torch

    unit: Any = torch.jit._state._python_cu
    return {function.qualified_name: function for function in unit.get_functions()}


def _graphs(made: Any, before: Container[str]) -> Iterator[Any]:
    """Yield the graphs of something scripted, and of the functions that were compiled on the way."""
    import torch

    for name, function in _functions().items():
        if name not in before:
            yield function.graph
    if isinstance(made, torch.nn.Module):
        for module in made.modules():
            inner: Any = getattr(module, "_c", None)
            for name in () if inner is None else inner._method_names():
                yield inner._get_method(name).graph


def _nodes(block: Any) -> Iterator[Any]:
    for node in list(block.nodes()):
        for inner in node.blocks():
            yield from _nodes(inner)
        yield node


def _redirect_moves(r: Redirection, graph: Any) -> None:
    """Let moves in a graph go to the true device. Saved, it moves there, too."""
    for node in _nodes(graph):
        if node.kind() == "aten::cuda":
            with graph.insert_point_guard(node):
                given = (r.translate("cuda"), None, False, r.hosts is not None)
                values = [graph.insertConstant(value) for value in given]
                moved = graph.insertNode(graph.create("aten::to", [node.inputsAt(0), *values], 1)).output()
            moved.setType(node.output().type())
            node.output().replaceAllUsesWith(moved)
            node.destroy()
        elif node.kind() == "aten::to" and node.inputsSize() in _TO_DEVICE:
            device = node.inputsAt(1)
            asked = device.toIValue() if device.node().kind() == "prim::Constant" else None
            if "Device" not in device.type().str():
                continue
            with graph.insert_point_guard(node):
                if asked is not None and r.translate(asked) is not asked:
                    node.replaceInput(1, graph.insertConstant(r.translate(asked)))
                if r.hosts is not None:
                    node.replaceInput(4, graph.insertConstant(True))


_TO_DEVICE = (5, 6)
"""`aten::to(self, device, dtype, non_blocking, copy)`, and `memory_format`."""


@api("torch.jit.script", note="what scripted code asks of devices is answered with the true one")
def script(r: Redirection, obj: Any, optimize: None = None, _frames_up: int = 0, *args: Any, **kwargs: Any) -> Any:
    """Compile, and look whether the code asks where its tensors are."""
    import torch

    before = _functions()
    # This function and the one that counts the call stand between the program and torch, which looks up names there.
    made = torch.jit.script(obj, optimize, _frames_up + 2, *args, **kwargs)
    for graph in _graphs(made, before):
        _redirect_moves(r, graph)
    found = _ASKS.search(str(getattr(made, "inlined_graph", "")))
    if found is not None:
        r.change("torch.jit.script", f"scripted code asks for {found[0].rpartition(':')[2]}, and is told {r.type!r}")
    return made
