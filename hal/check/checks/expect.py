# SPDX-License-Identifier: Apache-2.0
"""How a check says that a part of the interface is not what it should be."""

from __future__ import annotations


class Failed(Exception):
    """The backend does something else than the interface says."""


def expect(holds: object, otherwise: str) -> None:
    """Raise `Failed` unless the condition holds."""
    if not holds:
        raise Failed(otherwise)
