# SPDX-License-Identifier: Apache-2.0
"""The portable implementation of `FP8Ops`: torch's own 8-bit dtypes.

Legend: N blocks, B elements of a block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hal.errors import ShapeError
from hal.moe.checks import check_floating, check_shape
from hal.moe.fp8_ops import BLOCK, LARGEST_EXPONENT, FP8Format, FP8Ops, MXFormat, Scaled

_DTYPES = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "e8m0": torch.float8_e8m0fnu,
}


class TorchFP8Ops(FP8Ops):
    """`FP8Ops` on every device that torch can address; stateless."""

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """See `FP8Ops.cast_fp8`."""
        check_floating("cast_fp8", "x", x)
        return x.to(_dtype("cast_fp8", format)).view(torch.uint8)

    def uncast_fp8(self, codes: Tensor, format: FP8Format | Literal["e8m0"], dtype: str) -> Tensor:
        """See `FP8Ops.uncast_fp8`."""
        if codes.dtype != torch.uint8:
            raise ShapeError(f"uncast_fp8: codes are {codes.dtype}", expected="uint8")
        narrow = codes.contiguous().view(_dtype("uncast_fp8", format))
        wide: Tensor = narrow.to(getattr(torch, dtype))
        return wide

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `FP8Ops.scale_fp8`."""
        check_shape("scale_fp8", "x_NB", x_NB, ("N", BLOCK))
        check_floating("scale_fp8", "x_NB", x_NB)
        if format not in LARGEST_EXPONENT:
            raise ShapeError(f"scale_fp8: format {format!r}", expected=" or ".join(LARGEST_EXPONENT))
        wide_NB = x_NB.to(torch.float32)
        largest_N = wide_NB.abs().amax(dim=-1)  # NaN where one is
        # The exponent's field is floor(log2) + 127, and 0 for subnormal numbers, far below the smallest scale.
        field_N = (largest_N.view(torch.int32) >> 23).clamp(0, 255)
        scales_N = (field_N - LARGEST_EXPONENT[format]).clamp(min=0)
        # A power of two, so that the product is exact; 2^(127 - scale) itself has to be, too, in float32.
        factor_N1 = torch.ldexp(torch.ones_like(largest_N), 127 - scales_N)[:, None]
        limit = torch.finfo(_DTYPES[format]).max
        codes_NB = self.cast_fp8((wide_NB * factor_N1).clamp(-limit, limit), format)
        return Scaled(codes_NB, torch.where(field_N == 255, 255, scales_N).to(torch.uint8))


def _dtype(where: str, format: str) -> torch.dtype:
    try:
        return _DTYPES[format]
    except KeyError:
        raise ShapeError(f"{where}: no format {format!r}", expected=", ".join(_DTYPES)) from None


torch_fp8_ops = TorchFP8Ops()
"""The instance that everything uses unless told otherwise."""
