# SPDX-License-Identifier: Apache-2.0
"""Casts to 8-bit floating point and back, and block scales, as an interface.

    format     exponent, mantissa bits; bias   largest   infinities   NaN codes       -0
    e4m3fn     4, 3; 7                         448       none         7f, ff          80
    e4m3fnuz   4, 3; 8                         240       none         80              none
    e5m2       5, 2; 15                        57344     7c, fc       7d-7f, fd-ff    80
    e5m2fnuz   5, 2; 16                        57344     none         80              none
    e8m0       8, 0; 127, no sign              2^127     none         ff              none

The same bits mean half as much in a fnuz format as in its sibling, whose bias is smaller by one.

Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) Specification 1.0; for fnuz Noune et
al. 2022 (arXiv:2206.02915).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FP8Format = Literal["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"]
MXFormat = Literal["e4m3fn", "e5m2"]

BLOCK = 32
"""Elements that share one scale in the MX formats."""

LARGEST_EXPONENT: dict[str, int] = {"e4m3fn": 8, "e5m2": 15}
"""Exponent of the largest normal number of an MX element format."""


class Scaled(NamedTuple):
    """Blocks of 8-bit elements with their scales.

    Attributes:
        codes: uint8, the elements' bits, [N, 32].
        scales: uint8, the e8m0 bits of each block's scale, [N]: 2^(code - 127), and 255 for NaN.
    """

    codes: Tensor
    scales: Tensor


class FP8Ops(Protocol):
    """The operators. Codes are uint8: bits have no dtype that every device knows."""

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """Round to nearest, ties to even, once, and return the codes; subnormal numbers of the format are kept.

        A NaN stays one. What rounds beyond the largest number overflows in one of the two ways of the OCP
        specification, the same for all values: saturating, to the largest number of that sign (infinities, too); or
        not saturating, to infinity where the format has one and to NaN otherwise. torch 2.13 saturates to e4m3fn and
        does not to the three others.
        """
        ...

    def uncast_fp8(self, codes: Tensor, format: FP8Format | Literal["e8m0"], dtype: str) -> Tensor:
        """Return the numbers that the codes mean, in `float32`, `bfloat16` or `float16`, all of which is exact."""
        ...

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """Divide each block of 32 by a power of two and cast it.

            scale = 2^(floor(log2(max_b abs(x_b))) - emax), emax the exponent of the format's largest number, at least
            2^-127; element = cast(x / scale), saturating: up to twice the largest number can occur.

        A block of zeros has the smallest scale, code 0. A NaN or an infinity in a block makes its scale NaN, code 255,
        and with it the whole block, whatever the codes: a saturated infinity would hide an overflow.

        Source: OCP MX 1.0, section 6.3, which leaves zeros, infinities and NaN to the implementation.
        """
        ...
