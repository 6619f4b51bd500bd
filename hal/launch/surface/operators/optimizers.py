# SPDX-License-Identifier: Apache-2.0
"""torch's optimisers with `capturable=True`: the form that a CUDA graph can record computes the same without one."""

from __future__ import annotations

import sys

from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_NAME = "_get_capturable_supported_devices"


def install(redirection: Redirection, patches: Patches) -> None:
    """Add a CPU to the devices that may be captured; each optimiser's module has the function that lists them."""
    import torch.optim.optimizer as home

    own = getattr(home, _NAME, None)
    if own is None or redirection.hosts is None:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.optim.") and vars(module).get(_NAME) is own:
            patches.set(module, _NAME, _devices)


def _devices(supports_xla: bool = True) -> list[str]:
    # torch compiles optimisers to TorchScript, this with them, and there is no more of Python than this in it.
    return ["cpu", "cuda", "xpu", "hpu", "xla"]


_devices.__annotations__ = {"supports_xla": bool, "return": list[str]}
