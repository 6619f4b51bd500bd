# SPDX-License-Identifier: Apache-2.0
"""The net below everything else: a CUDA device that reaches torch's own factories, whoever passed it on.

`nn.Linear(3, 4, device="cuda")` hands the device to `torch.empty` inside torch, where no stand-in is. A torch without
CUDA has nothing registered for CUDA's dispatch key: what makes memory there is registered here, and makes it on the
device. It costs 7 to 9 microseconds for each tensor that is made so, and nothing for anything else.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_MAKERS = ("empty.memory_format", "empty_strided", "tril_indices", "triu_indices")


def install(redirection: Redirection, patches: Patches) -> None:
    """Register the makers of memory. A torch that has CUDA of its own is left alone: there the key is taken."""
    import torch

    if torch.backends.cuda.is_built():
        return
    # torch initialises CUDA once, by calling this, before the first tensor: let it pass, and not for longer. A lasting
    # replacement would make the compiler believe in CUDA. The tensor itself fails: nothing is registered yet.
    cuda: Any = torch.cuda
    lazy_init = cuda._lazy_init
    cuda._lazy_init = lambda: None
    try:
        with contextlib.suppress(RuntimeError):
            torch.empty(0, device="cuda:0")
    finally:
        cuda._lazy_init = lazy_init
    library = torch.library.Library("aten", "IMPL")
    for name in _MAKERS:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, _made(operator, redirection), "CUDA")
    patches.on_undo(library._destroy)


def _made(operator: Any, redirection: Redirection) -> Any:
    name = f"torch.{operator.name().removeprefix('aten::').partition('.')[0]}"

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Any:
        redirection.audit.count_nearest(name, sys._getframe(1))
        made = operator(*args, device=redirection.translate(device), **kwargs)
        return made if redirection.hosts is None else redirection.hosts.add_device(made)

    return make
