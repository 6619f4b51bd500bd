# SPDX-License-Identifier: Apache-2.0
"""Faults of 8-bit casts and block scales: one rounding, one code, one kind of number."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hal.moe.fp8_ops import FP8Format, MXFormat, Scaled
from hal.moe.torch_fp8_ops import TorchFP8Ops
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import in_order_of_memory
from hal_conformance.oracle import fp8

Format = FP8Format | Literal["e8m0"]


class FP8(TorchFP8Ops):
    """The portable operators, of which one can be changed."""

    families = ("fp8",)


def largest_of(format: str) -> float:
    """Return the largest finite number of a format."""
    return float(fp8.FORMATS[format].values[fp8.FORMATS[format].count - 1])


def values_of(codes: Tensor, format: str) -> Tensor:
    """Return what codes mean, in float64."""
    table = fp8.E8M0 if format == "e8m0" else fp8.FORMATS[format].values
    return torch.from_numpy(table.copy())[codes.long()]


class Before(FP8):
    """A cast of other numbers, or to another format."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """Return what is cast, and to what."""
        raise NotImplementedError

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """See `FP8Ops.cast_fp8`."""
        return super().cast_fp8(*self.before(x, format))


class After(FP8):
    """A cast whose codes are changed."""

    def after(self, codes: Tensor, x: Tensor, format: FP8Format) -> Tensor:
        """Return the changed codes."""
        raise NotImplementedError

    def cast_fp8(self, x: Tensor, format: FP8Format) -> Tensor:
        """See `FP8Ops.cast_fp8`."""
        return self.after(super().cast_fp8(x, format), x, format).to(torch.uint8)


class Read(FP8):
    """Codes that are read as other numbers."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """Return the changed numbers."""
        raise NotImplementedError

    def uncast_fp8(self, codes: Tensor, format: Format, dtype: str) -> Tensor:
        """See `FP8Ops.uncast_fp8`."""
        return self.read(super().uncast_fp8(codes, format, dtype), codes, format)


class Blocks(FP8):
    """Scaled blocks whose codes or scales are changed."""

    def change(self, made: Scaled, x_NB: Tensor, format: MXFormat) -> Scaled:
        """Return the changed blocks."""
        raise NotImplementedError

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `FP8Ops.scale_fp8`."""
        return self.change(super().scale_fp8(x_NB, format), x_NB, format)


@fault("triton#11217")
class TruncatesFp8(After):
    """Casts round towards zero."""

    def after(self, codes: Tensor, x: Tensor, format: FP8Format) -> Tensor:
        """See `After.after`."""
        further = values_of(codes, format).abs() > x.double().abs()
        return torch.where(further & ((codes & 0x7F) > 0), codes - 1, codes)


@fault("ml_dtypes PR#398")
class TiesAway(Before):
    """Casts round ties away from zero."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return torch.nextafter(x.float(), x.float().sign() * torch.inf), format


@fault("triton PR#10846")
class RoundsTwice(Before):
    """float32 is cast to float16 first."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x.half() if x.dtype == torch.float32 else x, format


@fault("triton PR#10846, with another dtype")
class RoundsTwiceByBfloat16(Before):
    """float32 is cast to bfloat16 first."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x.bfloat16() if x.dtype == torch.float32 else x, format


@fault("vllm PR#7210, the other way round")
class WritesFnuzAsFn(Before):
    """A format without infinities is written with the bias of its sibling."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x, "e5m2" if format == "e5m2fnuz" else format


@fault()
class NanToZero(Before):
    """NaN is cast to zero."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x.nan_to_num(0.0, torch.inf, -torch.inf), format


@fault("triton PR#3997")
class NanSaturates(Before):
    """NaN is clamped to the largest number, by a minimum that drops it."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x.nan_to_num(torch.inf, torch.inf, -torch.inf), format


@fault()
class SaturatesToInfinity(Before):
    """Numbers saturate and infinities do not: both rules at once."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        largest = largest_of(format)
        return torch.where(x.isinf(), x, x.clamp(-largest, largest)), format


@fault()
class OverflowsBeforeRounding(Before):
    """What lies beyond the largest number overflows, though it would round to it."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return torch.where(x.abs() > largest_of(format), x * torch.inf, x), format


@fault("triton#10745, the other way round")
class NegativeZeroIsNan(After):
    """-0 is cast to the code 80, which is NaN where there is no -0."""

    def after(self, codes: Tensor, x: Tensor, format: FP8Format) -> Tensor:
        """See `After.after`."""
        return torch.where((x == 0) & x.signbit(), 0x80, codes.int())


@fault("tvm#20315")
class FlushesSubnormals(After):
    """What is below the smallest normal number of the format is cast to zero."""

    def after(self, codes: Tensor, x: Tensor, format: FP8Format) -> Tensor:
        """See `After.after`."""
        small = (codes & 0x7F) < 2 ** fp8.FORMATS[format].mantissa
        return torch.where(small, 0 if format.endswith("fnuz") else codes & 0x80, codes)


@fault("vllm PR#7210")
class ReadsFnuzAsFn(FP8):
    """Codes of a format without -0 are read as those of its sibling: numbers are twice as large."""

    def uncast_fp8(self, codes: Tensor, format: Format, dtype: str) -> Tensor:
        """See `FP8Ops.uncast_fp8`."""
        return super().uncast_fp8(codes, "e4m3fn" if format == "e4m3fnuz" else format, dtype)


@fault("triton#10745")
class NanIsNegativeZero(Read):
    """The one NaN of a format without -0 is read as -0."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return torch.where(codes == 0x80, -0.0, x) if format.endswith("fnuz") else x


@fault("triton PR#11784")
class InfinityIsANumber(Read):
    """Infinity of e5m2 is read as 65536."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return torch.where(x.isinf(), x.sign() * 65536.0, x)


@fault("tvm#20315")
class ReadsSubnormalsAsZero(Read):
    """The smallest subnormal number is read as zero."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return x if format == "e8m0" else torch.where((codes & 0x7F) == 1, 0 * x, x)


@fault()
class ReadsNoTail(Read):
    """Codes beyond a multiple of 16 are not read."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return torch.where(torch.arange(len(x)) < len(x) // 16 * 16, x, torch.zeros_like(x))


@fault("vllm PR#43557")
class ScaleNanIsInfinity(Read):
    """The scale of code 255 is read as 2^128, which is infinity, instead of NaN."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return torch.where(x.isnan(), torch.inf, x) if format == "e8m0" else x


@fault("vllm PR#46676")
class ScaleRoundsUp(FP8):
    """Scales are rounded up to the next power of two, so that nothing saturates."""

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `FP8Ops.scale_fp8`."""
        limit = largest_of(format)
        power_N1 = torch.log2((x_NB.float().abs().amax(-1, keepdim=True) / limit).clamp(min=2.0**-127)).ceil()
        power_N1 = power_N1.nan_to_num(0.0, 0.0, 0.0).clamp(-127, 127)
        codes_NB = self.cast_fp8(torch.ldexp(x_NB.double(), -power_N1).float().clamp(-limit, limit), format)
        return Scaled(codes_NB, (power_N1[:, 0] + 127).to(torch.uint8))


@fault()
class BlocksOverflow(Blocks):
    """Elements beyond the largest number of their block become NaN or infinite instead of saturating."""

    def change(self, made: Scaled, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `Blocks.change`."""
        scaled = np.ldexp(x_NB.double().numpy(), 127 - made.scales.int().numpy()[:, None])
        return made._replace(codes=torch.from_numpy(fp8.cast(scaled, format, saturate=False)))


@fault()
class BlockOfZerosHasScaleOne(Blocks):
    """A block of zeros has the scale 1."""

    def change(self, made: Scaled, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `Blocks.change`."""
        return made._replace(scales=torch.where((x_NB == 0).all(-1), 127, made.scales.int()).to(torch.uint8))


@fault()
class InfiniteBlocksSaturate(Blocks):
    """A block with an infinity has the largest scale, which hides it."""

    def change(self, made: Scaled, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `Blocks.change`."""
        return made._replace(scales=torch.where(x_NB.isinf().any(-1), 254, made.scales.int()).to(torch.uint8))


@fault("vllm PR#43557")
class NanBlocksAreIgnored(FP8):
    """The maximum of a block passes over NaN."""

    def scale_fp8(self, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `FP8Ops.scale_fp8`."""
        return super().scale_fp8(x_NB.nan_to_num(0.0, torch.inf, -torch.inf), format)


@fault()
class CastsInOrderOfMemory(Before):
    """Elements are read one after the other from memory, whatever the strides."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return in_order_of_memory(x), format


@fault()
class CastsOneLaunch(After):
    """Codes beyond the first 65,536 elements are zero."""

    def after(self, codes: Tensor, x: Tensor, format: FP8Format) -> Tensor:
        """See `After.after`."""
        return torch.where(torch.arange(codes.numel()).view(codes.shape) < 2**16, codes, 0)


@fault()
class ReadsOneLaunch(Read):
    """Numbers beyond the first 65,536 are zero."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        return torch.where(torch.arange(x.numel()).view(x.shape) < 2**16, x, torch.zeros((), dtype=x.dtype))


@fault()
class CastsNothingNot(Before):
    """A cast of no elements fails."""

    def before(self, x: Tensor, format: FP8Format) -> tuple[Tensor, FP8Format]:
        """See `Before.before`."""
        return x.flatten().view(x.shape) if x.numel() else x[0], format


@fault()
class ReadsRowsNotToTheEnd(Read):
    """The last element of each row of a matrix of codes is read as zero."""

    def read(self, x: Tensor, codes: Tensor, format: Format) -> Tensor:
        """See `Read.read`."""
        if x.dim() < 2 or not x.numel():
            return x
        return torch.cat((x[..., :-1], torch.zeros_like(x[..., -1:])), -1)


@fault()
class ScalesNoOddBlock(Blocks):
    """A block that is left over by groups of 32 has the scale 1."""

    def change(self, made: Scaled, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `Blocks.change`."""
        if len(x_NB) % 32 != 1:
            return made
        return made._replace(scales=torch.cat((made.scales[:-1], torch.full_like(made.scales[-1:], 127))))


@fault()
class ScalesWholeHundreds(Blocks):
    """Of more than 128 blocks, codes of those that are left over by groups of 128 are zero."""

    def change(self, made: Scaled, x_NB: Tensor, format: MXFormat) -> Scaled:
        """See `Blocks.change`."""
        whole = len(x_NB) - len(x_NB) % 128
        return made if not whole else made._replace(codes=torch.cat((made.codes[:whole], made.codes[whole:] * 0)))


@fault()
class CastsNoScalar(After):
    """A number without axes cannot be cast."""

    def after(self, codes: Tensor, x: Tensor, format: FP8Format) -> Tensor:
        """See `After.after`."""
        return codes if x.dim() else codes[0]
