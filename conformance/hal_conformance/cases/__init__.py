# SPDX-License-Identifier: Apache-2.0
"""Every case of the suite, by name."""

from __future__ import annotations

from hal_conformance.case import Case
from hal_conformance.cases import attention, combine, dispatch, experts, head, layer, losses, norm, rotary, router

ALL: tuple[Case, ...] = (
    *router.CASES,
    *dispatch.CASES,
    *experts.CASES,
    *combine.CASES,
    *losses.CASES,
    *layer.CASES,
    *norm.CASES,
    *rotary.CASES,
    *attention.CASES,
    *head.CASES,
)


def by_name(name: str) -> Case:
    """Return the case of that name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME = {case.name: case for case in ALL}
