# SPDX-License-Identifier: Apache-2.0
"""Every case of the suite, by name."""

from __future__ import annotations

from hal_conformance.case import Case

ALL: tuple[Case, ...] = ()


def by_name(name: str) -> Case:
    """Return the case of that name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME = {case.name: case for case in ALL}
