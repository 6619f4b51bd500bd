# SPDX-License-Identifier: Apache-2.0
"""Honest 8-bit casts: by tables, by another library, with either saturation, and what contracts leave open."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from hal.moe.fp8_ops import FP8Format, MXFormat, Scaled
from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.fp8 import FP8, Before, Format, Read, largest_of, values_of
from hal_conformance.oracle import fp8


@benign()
class CastsByTable(FP8):
    """Codes are looked up, and found by the midpoints between them; every format saturates."""

    saturate = True

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """See `FP8Ops.cast_fp8`."""
        return torch.from_numpy(fp8.cast(x.double().numpy(), format, saturate=self.saturate))

    def uncast_fp8(self, codes: Tensor, format: Format, dtype: str) -> Tensor:
        """See `FP8Ops.uncast_fp8`."""
        wide: torch.dtype = getattr(torch, dtype)
        return values_of(codes, format).to(wide)


@benign()
class NothingSaturates(CastsByTable):
    """As CastsByTable, and no format saturates."""

    saturate = False


@benign()
class ScalesInFloat64(FP8):
    """Blocks are scaled in float64, by a logarithm that is exact."""

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `FP8Ops.scale_fp8`."""
        codes, scales = fp8.scale(x_NB.double().numpy(), format)
        return Scaled(torch.from_numpy(codes), torch.from_numpy(scales))


@benign()
class ClampsFirst(Before):
    """Numbers are clamped before they are cast; a NaN passes."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x.clamp(-largest_of(format), largest_of(format)), format


@benign()
class ByMlDtypes(FP8):
    """Casts of another library, from float32."""

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """See `FP8Ops.cast_fp8`."""
        with np.errstate(invalid="ignore", over="ignore"):
            made = x.float().numpy().astype(getattr(ml_dtypes, f"float8_{format}"))
        return torch.from_numpy(made.view(np.uint8))


@benign()
class TakesSubnormalsForZero(Before):
    """Subnormal inputs are zero, which the contract of a CPU leaves open."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return torch.where(x.abs() < torch.finfo(x.dtype).tiny, x * 0, x), format


@benign()
class ReadsScaleZeroAsZero(Read):
    """The scale of code 0, a subnormal number, is read as 0, which the contract of a CPU leaves open."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return torch.where(codes == 0, 0 * x, x)
