# SPDX-License-Identifier: Apache-2.0
"""torch's table of kernels: operators by name, and kernels that are put in the place of torch's for a while."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]

simulating = False
"""Whether a simulated device multiplies at present; attention, too: for any widths, and each gradient rounded once."""

_idle: set[tuple[str, str]] = set()
"""Operators and keys that have a kernel while a simulated device is open, and torch has none."""


def find_operator(name: str) -> Any:
    """Return one of torch's operators, such as `addmm` or `sum.dim_IntList`, or None in a version that has it not."""
    import torch

    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def has_kernel(operator: Any, key: str) -> bool:
    """Return whether an operator has a kernel of its own for a dispatch key, at present."""
    import torch

    if (operator.name(), key) in _idle:
        return simulating
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


def register(library: Any, operator: Any, key: str, kernel: Kernel, **how: bool) -> None:
    """Register a kernel, and have those who trace ask anew which one serves the key: torch keeps what it once found.

    So an operator that was compiled before would go on being decomposed where there is a kernel now.
    """
    library.impl(operator, kernel, key, **how)
    operator._dispatch_cache.clear()


def add_kernel(library: Any, name: str, key: str, kernel: Kernel) -> None:
    """Register a kernel where this version of torch has the operator, and no kernel of its own."""
    found = find_operator(name)
    if found is not None and not has_kernel(found, key):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one which is idle
            register(library, found, key, kernel)


def can_replace() -> bool:
    """Return whether torch lets its own kernels be called when others are in their place: since 2.10."""
    import torch

    return hasattr(torch.library, "get_kernel")


def replace_kernel(library: Any, operator: Any, key: str, make: Callable[[Kernel], Kernel]) -> None:
    """Put a kernel in the place of torch's own, which comes back with the library's end.

    Args:
        library: `torch.library.Library(operator.namespace, "IMPL")`.
        operator: an overload, such as `torch.ops.aten.mm.default`.
        key: the dispatch key.
        make: given torch's kernel, returns the other; both take the set of dispatch keys before the arguments. If torch
            has none, it is given what says so.
    """
    own = _own(operator, key)
    if own is None:
        _idle.add((operator.name(), key))
    kernel = make(own or _none(operator, key))
    _leave_to_python(kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before; it is called, and comes back
        register(library, operator, key, kernel, with_keyset=True)


def _leave_to_python(kernel: Kernel) -> None:
    """Keep torch's compiler from tracing a kernel, and what it calls, where it is called by code that is not compiled.

    The compiler looks at every frame of Python's that begins within a compiled function, also below torch's dispatcher.
    """
    from torch._C._dynamo import eval_frame as frames

    skip = frames._FrameAction.SKIP
    code = getattr(kernel, "func", kernel).__code__
    frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


def forget_compiled() -> None:
    """Have all compiled code compiled anew: it keeps the kernels and the answers that it was given."""
    reset = getattr(sys.modules.get("torch._dynamo"), "reset", None)  # none while another thread imports it
    if reset is not None:
        reset()


def _own(operator: Any, key: str) -> Kernel | None:
    import torch

    try:
        # Parsed here, since Python has no name for some keys (MkldnnCPU).
        own: Kernel = torch.library.get_kernel(operator, torch._C._dispatch_key_parse(key)).call_boxed
    except RuntimeError:
        return None
    return own


def _none(operator: Any, key: str) -> Kernel:
    def none(keys: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Could not run '{operator.name()}' with arguments from the '{key}' backend.")

    return none
