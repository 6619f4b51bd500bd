# SPDX-License-Identifier: Apache-2.0
"""Functions of the module that torch has for a type of device, which need not have all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.errors import UnsupportedOperation

if TYPE_CHECKING:
    import torch


def module_function(module: Any, name: str, device: torch.device, device_id: str, facet: str) -> Any:
    """Return a function of a module.

    Raises:
        UnsupportedOperation: the module has none of that name.
    """
    function = getattr(module, name, None)
    if function is None:
        raise UnsupportedOperation(f"torch.{device.type} has no {name}", device=device_id, what=f"{facet}.{name}")
    return function
