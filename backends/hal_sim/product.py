# SPDX-License-Identifier: Apache-2.0
"""Products of matrices as a simulated device computes them: operands, schedule, unit."""

from __future__ import annotations

import torch

from hal.matrix_unit import FORMATS, MatrixUnit
from hal_sim import native, twin
from hal_sim.grouped import Lengths
from hal_sim.schedule import Schedule

ONE_PIECE = Schedule()


def operand(x: torch.Tensor, format: str) -> torch.Tensor:
    """Return an operand as the unit takes it in: float32 (float64 of float64), cut or rounded to its format's bits.

    The compiled core reads numbers of 16 and 8 bits as they are.

    TF32 units drop the low 13 bits of a float32. Ascend's HF32 keeps 12 bits, here rounded to nearest (unverified).
    """
    if x.dtype == torch.float64:
        return x
    wide = x.float()
    if format == "tf32":
        cut = (wide.view(torch.int32) & ~0x1FFF).view(torch.float32)
        if bool(wide.sum().isnan()):  # the quickest look for a NaN, which without its low bits may be an infinity
            cut = torch.where(wide.isnan(), wide, cut)
        wide = cut
    elif format == "hf32":
        bits = wide.view(torch.int32)
        nearest = (bits + 0x7FF + ((bits >> 12) & 1)) & ~0xFFF
        wide = torch.where(wide.isfinite(), nearest, bits).view(torch.float32)
    return wide


def multiply(
    a_BMK: torch.Tensor, b_BKN: torch.Tensor, unit: MatrixUnit, formats: tuple[str, str], schedule: Schedule = ONE_PIECE
) -> torch.Tensor:
    """Return a b in float32 (float64 of float64), each element summed by `unit` in the pieces of `schedule`.

    Args:
        a_BMK: B matrices of any strides, and of a dtype whose numbers `formats[0]` holds.
        b_BKN: the same.
        unit: the rule.
        formats: of a and of b, keys of `FORMATS`.
        schedule: how K is shared out.

    Raises:
        RuntimeError: the shapes do not go together.
        MemoryError: copies of the operands do not fit.
    """
    B, M, K = a_BMK.shape
    N = b_BKN.shape[2]
    if b_BKN.shape[:2] != (B, K):  # the compiled core would read beyond the operand
        raise RuntimeError(f"{tuple(a_BMK.shape)} and {tuple(b_BKN.shape)} cannot be multiplied")
    itemsize = a_BMK.element_size()
    library = native.library()
    if library is None or itemsize > 2:
        a_BMK, b_BKN = operand(a_BMK, formats[0]), operand(b_BKN, formats[1])
    if not B * M * N * K:
        return torch.zeros((B, M, N), dtype=torch.float64 if itemsize == 8 else torch.float32)
    least = (FORMATS[formats[0]].min_exponent, FORMATS[formats[1]].min_exponent)
    total: torch.Tensor | None = None
    for slices in schedule.pieces(K, itemsize):
        of_slice: torch.Tensor | None = None
        for at in slices:
            a, b = a_BMK[:, :, at], b_BKN[:, at]
            if library is None:
                part = twin.multiply(a, b, torch.zeros((), dtype=a.dtype).expand(B, M, N), unit, least)
            else:
                part = native.multiply(library, a, b, None, unit, least)
            of_slice = part if of_slice is None else _sum(of_slice, part, unit)
        assert of_slice is not None
        total = of_slice if total is None else _sum(total, of_slice, unit)
    assert total is not None
    return total


def multiply_groups(
    unit: MatrixUnit, formats: tuple[str, str], a: torch.Tensor, b: torch.Tensor, lengths: Lengths, exchanged: bool
) -> torch.Tensor:
    """Return the products of groups in float32, each in one piece, by one call of the compiled core.

    Args:
        unit: the rule.
        formats: of the operands, keys of `FORMATS`.
        a, b: [R, K] and [G, K, N], or [M, R] and [R, N], of dtypes whose numbers the formats hold.
        lengths: the groups of R.
        exchanged: whether the formats are those of b and a.

    Returns:
        [R, N] or [G, M, N]. What no group has is zero.

    Raises:
        MemoryError: copies of the operands do not fit.
    """
    formats = formats[::-1] if exchanged else formats
    a, b = (x if x.element_size() <= 2 else operand(x, format) for x, format in zip((a, b), formats, strict=True))
    least = (FORMATS[formats[0]].min_exponent, FORMATS[formats[1]].min_exponent)
    N = b.shape[-1]
    if b.ndim == 3:
        # Only what no group has is filled with zeros: torch's threads, woken to fill all, would be in the core's way.
        out = torch.empty(a.shape[0], N)
        out[lengths[-1][0] + lengths[-1][1] if a.shape[1] and lengths else 0 :] = 0
    else:
        out = torch.empty(len(lengths), a.shape[0], N)
    native.multiply_groups(native.library(), a, b, out, unit, least, lengths)
    return out


def _sum(x: torch.Tensor, y: torch.Tensor, unit: MatrixUnit) -> torch.Tensor:
    with twin.subnormals():
        return twin.with_one_nan(x + y, unit)
