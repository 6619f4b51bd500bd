# SPDX-License-Identifier: Apache-2.0
"""Checks of plain arguments: each returns what it was given in one type, or raises a `ConfigError`."""

from __future__ import annotations

import math
import operator

from hal.errors import ConfigError


def integer(what: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer in [least, most], or from `least` on; numpy's integers count, a bool does not.

    Raises:
        ConfigError: it is no integer, or lies outside.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{what} is {value!r}", expected=f"an integer {span}")
    return number


def number(what: str, value: object, least: float, most: float) -> float:
    """Return a finite number in [least, most] as a float; a bool is none.

    Raises:
        ConfigError: it is no number, is not finite, or lies outside.
    """
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Python compares an int of any size with a float exactly, and a NaN with nothing.
    if not (plain and least <= value <= most and math.isfinite(value)):  # type: ignore[operator, arg-type]
        raise ConfigError(f"{what} is {value!r}", expected=f"a number from {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]
