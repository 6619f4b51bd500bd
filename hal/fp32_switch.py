# SPDX-License-Identifier: Apache-2.0
"""torch's own float32 switches (torch 2.9 and later), read and put back as what they are: settings that inherit.

torch keeps a tree: everything, one library ("mkldnn", "cuda"), one operation of it ("matmul", "conv", "rnn"). A node
that says "none" takes the value of the node above (aten/src/ATen/Context.cpp, `float32Precision`), and reading shows
the value in force, whosever it is. To write that back would turn what was inherited into the node's own value, which
no later setting above it reaches any more.
"""

from __future__ import annotations

from typing import Any

from hal.changes import Switch

_EVERYTHING = ("generic", "all")


def fp32_switch(library: str, operation: str, name: str) -> Switch:
    """Return the switch of one node of torch's tree.

    Args:
        library, operation: the node, in the words of torch's C++ interface; "all" is the library itself.
        name: as a user would write it.
    """
    return Switch(
        name,
        read=lambda: _read(library, operation),
        write=lambda value: _write(library, operation, value),
        saved=lambda: own_value(library, operation),
    )


def own_value(library: str, operation: str) -> str:
    """Return what a node itself says; "none" if it inherits.

    torch does not tell. Where the node has a value, the node above is set to another one for a moment, to see whether
    this one follows; a product that another thread starts in that moment may be computed in that mode.
    """
    in_force = _read(library, operation)
    if (library, operation) == _EVERYTHING or in_force == "none":
        return in_force
    above = _EVERYTHING if operation == "all" else (library, "all")
    kept = own_value(*above)
    other = "ieee" if in_force != "ieee" else "tf32"
    try:
        _write(*above, other)
        follows = _read(library, operation) == other
    finally:
        _write(*above, kept)
    return "none" if follows else in_force


def has_fp32_switches() -> bool:
    """Return whether this torch has them."""
    import torch

    return hasattr(torch._C, "_get_fp32_precision_getter")


# The public attributes do the same, except that `torch.backends.mkldnn.fp32_precision` writes the node of everything
# (torch/backends/mkldnn/__init__.py, in 2.13 to 2.15).


def _read(library: str, operation: str) -> str:
    import torch

    torch_c: Any = torch._C
    return str(torch_c._get_fp32_precision_getter(library, operation))


def _write(library: str, operation: str, value: str) -> None:
    import torch

    torch_c: Any = torch._C
    torch_c._set_fp32_precision_setter(library, operation, value)
