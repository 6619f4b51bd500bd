# SPDX-License-Identifier: Apache-2.0
"""8-bit floating point: what each code means, and which code a number is rounded to. Everything is exact.

Legend: N blocks, B elements of a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hal.moe.fp8_ops import LARGEST_EXPONENT
from hal_conformance.case import F64

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """A format with a sign.

    Attributes:
        exponent, mantissa: bits of either.
        bias: of the exponent.
        fnuz: whether the code of -0 is the only NaN.
        infinities: whether the largest exponent is for infinities and NaN, as in IEEE 754.
    """

    exponent: int
    mantissa: int
    bias: int
    fnuz: bool = False
    infinities: bool = False

    @functools.cached_property
    def values(self) -> F64:
        """What the 256 codes mean."""
        code = np.arange(256)
        field, fraction = (code >> self.mantissa) & (2**self.exponent - 1), code & (2**self.mantissa - 1)
        power = np.maximum(field, 1) - self.bias
        size = np.ldexp((field > 0) + fraction * 2.0**-self.mantissa, power)
        if self.fnuz:
            size[0x80] = np.nan
        elif self.infinities:
            top = field == 2**self.exponent - 1
            size[top] = np.where(fraction[top] == 0, np.inf, np.nan)
        else:
            size[(code & 0x7F) == 0x7F] = np.nan
        return np.asarray(np.where(code & 0x80, -size, size))

    @functools.cached_property
    def count(self) -> int:
        """How many codes of positive sign are finite: codes 0 to count - 1, in the order of their values."""
        return int(np.isfinite(self.values[:128]).sum())

    @functools.cached_property
    def midpoints(self) -> F64:
        """Halfway between each finite size and the next, the last one as if the format went on."""
        sizes = self.values[: self.count]
        beyond = 2.0 * sizes[-1] - sizes[-2]
        return np.asarray((sizes + np.append(sizes[1:], beyond)) / 2.0)

    @functools.cached_property
    def nan(self) -> npt.NDArray[np.bool_]:
        """Which of the 256 codes are NaN."""
        return np.isnan(self.values)


FORMATS = MappingProxyType(
    {
        "e4m3fn": Format(4, 3, 7),
        "e4m3fnuz": Format(4, 3, 8, fnuz=True),
        "e5m2": Format(5, 2, 15, infinities=True),
        "e5m2fnuz": Format(5, 2, 16, fnuz=True),
    }
)

E8M0: F64 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)
"""What the 256 codes of a scale mean."""


def cast(x: F64, name: str, *, saturate: bool) -> Codes:
    """Return the code that each number is rounded to: to nearest, ties to the even code, once.

    The codes of one sign count up with the sizes, so the code is the number of midpoints below |x|; on a midpoint the
    even one of the two codes. Whatever reaches the code after the largest overflows, infinities too: to the largest
    number, or to infinity where the format has one and to NaN otherwise. NaN gives 0x7f, or 0x80 in fnuz; any other
    NaN of the format is as good. fnuz has no -0.
    """
    format = FORMATS[name]
    size = np.abs(x)
    code = np.searchsorted(format.midpoints, size, "left")
    tie = (code < format.count) & (size == format.midpoints[np.minimum(code, format.count - 1)])
    code = code + (tie & (code % 2 == 1))
    nan = 0x80 if format.fnuz else 0x7F
    beyond = code >= format.count
    negative = np.signbit(x)
    if saturate:
        code = np.where(beyond, format.count - 1, code)
    elif format.infinities:
        code = np.where(beyond, format.count, code)
    signed = np.where(negative & ~(format.fnuz & (code == 0)), code | 0x80, code)
    lost = np.isnan(x) | (beyond & (not saturate and not format.infinities))
    return np.asarray(np.where(lost, nan, signed), np.uint8)


def scale(x_NB: F64, name: str) -> tuple[Codes, Codes]:
    """Return the codes of the elements and of the scales; the codes of a block with a NaN scale mean nothing."""
    largest = np.abs(x_NB).max(-1)
    broken = ~np.isfinite(largest)
    _, power = np.frexp(np.where(broken | (largest == 0), 1.0, largest))  # largest = f 2^power, f in [1/2, 1)
    exponent = np.where(largest == 0, -127, np.maximum(power - 1 - LARGEST_EXPONENT[name], -127))
    codes = cast(np.ldexp(x_NB, -exponent[:, None]), name, saturate=True)
    return codes, np.asarray(np.where(broken, 255, exponent + 127), np.uint8)
