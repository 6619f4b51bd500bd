# SPDX-License-Identifier: Apache-2.0
"""torch.jit.script: scripted code names torch's functions, and finds them by identity, ours as well as torch's own.

What scripted code asks of a tensor's device it asks without Python, and is told the true one: that is a change of
meaning, which the report names.
"""

from __future__ import annotations

import re
from typing import Any

from hal.launch.api import api
from hal.launch.modules import stood_in
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_ASKS = re.compile(r"prim::(device|is_cuda|type)\b|aten::(is_cuda|get_device)\b")


def install(redirection: Redirection, patches: Patches) -> None:
    """Let the compiler of scripts know what stands in for torch's functions, once it asks."""
    import torch.jit._builtins as builtins

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


@api("torch.jit.script", note="what scripted code asks of devices is answered with the true one")
def script(r: Redirection, obj: Any, optimize: None = None, _frames_up: int = 0, *args: Any, **kwargs: Any) -> Any:
    """Compile, and look whether the code asks where its tensors are."""
    import torch

    # This function and the one that counts the call stand between the program and torch, which looks up names there.
    made = torch.jit.script(obj, optimize, _frames_up + 2, *args, **kwargs)
    found = _ASKS.search(str(getattr(made, "inlined_graph", "")))
    if found is not None:
        r.change("torch.jit.script", f"scripted code asks for {found[0].rpartition(':')[2]}, and is told {r.type!r}")
    return made
