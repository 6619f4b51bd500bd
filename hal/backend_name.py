# SPDX-License-Identifier: Apache-2.0
"""What a backend may be called: the name is part of device ids, of comma-separated lists and of module names."""

from __future__ import annotations

import keyword
import re

LONGEST = 50
"""Characters of a name: it becomes part of file names and of a distribution's name."""

RESERVED = ("auto", "all")
"""What `open_device` and `hal conformance run --device` take for something else."""

_WORD = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def is_word(name: str) -> bool:
    """Return whether a text has the form of a backend's or a torch device type's name."""
    return _WORD.fullmatch(name) is not None and len(name) <= LONGEST


def fault_of(name: str) -> str | None:
    """Return what makes a text unfit to be a backend's name, as a clause that follows it; None if it is fit."""
    if name in RESERVED:
        return "means something else where a device is named"
    if keyword.iskeyword(name):
        return "is a keyword of Python"
    if not is_word(name):
        return (
            f"is not of at most {LONGEST} lower-case letters and digits, beginning with a letter, with single "
            "underscores between them"
        )
    return None
