# SPDX-License-Identifier: Apache-2.0
"""Names under which functions that stand in for torch's can be pickled.

`torch.zeros` of a redirected program is pickled as `torch.zeros` in this module, and is found again wherever hal is
installed: as what that process sees under the name, redirected or not.
"""

from __future__ import annotations

from typing import Any

from hal.launch.stand_ins import seen_module


def __getattr__(name: str) -> Any:
    if name != "torch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return seen_module("torch")


def name_of(function: Any) -> str | None:
    """Return the name that a stand-in was given; None of any other function."""
    return function.__qualname__ if getattr(function, "__module__", None) == __name__ else None


def give_name(function: Any, name: str) -> None:
    """Let a stand-in be pickled under torch's name for what it stands in for."""
    function.__module__ = __name__
    function.__qualname__ = name
