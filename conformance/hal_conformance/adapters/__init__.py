# SPDX-License-Identifier: Apache-2.0
"""Other people's MoE code behind the methods of `hal.moe.MoEOps`, so that `--impl` takes it.

An adapter builds the library's own module or calls its own functions, on the tensors that a case gives, through
autograd, and returns what they said in our types. It computes nothing that is judged: `watching` sees scores and
choices where the library keeps them to itself. What a library cannot express is `unsupported`, case by case. No library
is imported before one of its adapters is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hal.errors import ConfigError, UnsupportedOperation

if TYPE_CHECKING:
    from torch import Tensor


def unsupported(reason: str, at: Tensor) -> UnsupportedOperation:
    """Return what an implementation raises where a case is not for it: the verdict is UNSUPPORTED, with the reason.

    Args:
        reason: which equation or argument the implementation does not have.
        at: a tensor of the case, for the device.
    """
    return UnsupportedOperation(reason, device=str(at.device), what="conformance case")


def library(name: str, package: str) -> Any:
    """Import a module of a library.

    Raises:
        ConfigError: the library, or something that it imports, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"cannot import {name}: there is no module {error.name}",
            expected=f"{package}, with what it imports",
            hint=f"pip install {package}",
        ) from error
