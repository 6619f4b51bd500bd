# SPDX-License-Identifier: Apache-2.0
"""torch's table of kernels: operators by name, and kernels that are put in the place of torch's for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

Kernel = Callable[..., Any]


def find_operator(name: str) -> Any:
    """Return one of torch's operators, such as `addmm` or `sum.dim_IntList`, or None in a version that has it not."""
    import torch

    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def has_kernel(name: str, key: str) -> bool:
    """Return whether an operator that exists has a kernel for a dispatch key."""
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def add_kernel(library: Any, name: str, key: str, kernel: Kernel) -> None:
    """Register a kernel where this version of torch has the operator, and no kernel of its own."""
    found = find_operator(name)
    if found is not None and not has_kernel(name, key):
        library.impl(found, kernel, key)


def replace_kernel(library: Any, name: str, key: str, make: Callable[[Kernel], Kernel]) -> None:
    """Put a kernel in the place of torch's own, which comes back with the library's end; before torch 2.10 it stays.

    Args:
        library: `torch.library.Library("aten", "IMPL")`.
        name: of an operator that has a kernel for this key.
        key: the dispatch key.
        make: given torch's kernel, returns the other; both take the set of dispatch keys before the arguments.
    """
    import torch

    if not hasattr(torch.library, "get_kernel"):
        return
    found = find_operator(name)
    kernel = make(torch.library.get_kernel(found, key).call_boxed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before; it is called, and comes back
        library.impl(found, kernel, key, with_keyset=True)
