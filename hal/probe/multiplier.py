# SPDX-License-Identifier: Apache-2.0
"""One way to multiply matrices on a device: a format of operands and what comes back, in float64 on the host.

Shapes: M rows, N columns, K products in each element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from hal.errors import HalError
from hal.matrix_unit import FORMATS, PARTNERS, InputFormat

if TYPE_CHECKING:
    from hal.device import Device

STORED = {"tf32": "float32", "hf32": "float32"}
"""Formats that no tensor has: what holds their numbers."""

LARGEST_EXPONENT = {
    "float64": 1000, "float32": 120, "tf32": 120, "hf32": 120, "bfloat16": 120, "float16": 15, "float8_e4m3fn": 8,
    "float8_e5m2": 15, "float8_e4m3fnuz": 7, "float8_e5m2fnuz": 15,
}  # fmt: skip
"""Powers of two that a probe may use. The widest formats have some more, which would overflow in a product."""

OUTER = 64
"""Rows and columns of the products that a probe makes."""

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Multiplier:
    """Multiplies matrices on a device.

    Attributes:
        format: of the operands, a key of `hal.matrix_unit.FORMATS`.
        device: where.
        kernel: a [M, K] and b [K, N] there, of `dtype`, to [M, N] there.
        dtype: of the operands.
        result: dtype that the kernel returns.
        outer: M and N of the products that a probe makes.
        partner: format of b, where the device does not multiply two of `format` (`hal.matrix_unit.PARTNERS`).
        multiple: K must be one of it.
    """

    format: str
    device: torch.device
    kernel: Kernel
    dtype: torch.dtype
    result: torch.dtype
    outer: int = OUTER
    partner: str | None = None
    multiple: int = 1
    calls: list[int] = field(default_factory=lambda: [0], compare=False)

    def __call__(self, a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        """Return a b in float64.

        Args:
            a_MK: float64 tensor on the host, of numbers that the format has.
            b_KN: the same, of the partner's.
        """
        return self.raw(a_MK, b_KN).double()

    def raw(self, a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        """Return a b on the host as the device stores it."""
        self.calls[0] += 1
        return self.kernel(*self.placed(a_MK, b_KN)).cpu()

    def placed(self, a_MK: torch.Tensor, b_KN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return operands on the device; converted on the host, whose conversions are exact for what a probe uses."""
        of_b = getattr(torch, self.partner) if self.partner else self.dtype
        return _converted(a_MK, self.dtype).to(self.device), _converted(b_KN, of_b).to(self.device)

    @property
    def formats(self) -> tuple[str, str]:
        """Those of a and b."""
        return self.format, self.partner or self.format

    @property
    def name(self) -> str:
        """The format, and the partner's where it is another."""
        return self.format if self.partner is None else f"{self.format} by {self.partner}"

    @property
    def numbers(self) -> InputFormat:
        """What both operands can be."""
        of_a, of_b = (FORMATS[format] for format in self.formats)
        return InputFormat(min(of_a.bits, of_b.bits), max(of_a.min_exponent, of_b.min_exponent))

    @property
    def largest_exponent(self) -> int:
        """The largest power of two that a probe may use as an operand."""
        return min(LARGEST_EXPONENT[format] for format in self.formats)

    def inner(self, K: int) -> int:
        """Return the least inner length from K on that the kernel takes."""
        return -(-K // self.multiple) * self.multiple

    def one_row_at_a_time(self) -> Multiplier:
        """Return the same for products with a single row: such a one may take another kernel."""
        kernel = self.kernel
        return replace(self, kernel=lambda a, b: torch.cat([kernel(row, b) for row in a.split(1)]))

    def one_column_at_a_time(self) -> Multiplier:
        """Return the same for products with a single column."""
        kernel = self.kernel
        return replace(self, kernel=lambda a, b: torch.cat([kernel(a, c.contiguous()) for c in b.split(1, 1)], 1))


def _converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 numbers in another dtype; a NaN keeps its sign, which torch's conversion to bfloat16 may not."""
    made = x.to(dtype)
    if dtype == torch.bfloat16 and bool((nan := x.isnan()).any()):
        made.view(torch.int16)[nan] = torch.where(x[nan].signbit(), -0x40, 0x7FC0).to(torch.int16)
    return made


CODES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What holds the bits of a result, by its bytes."""


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of each element, so that NaN equals itself and -0 is not 0."""
    return x.contiguous().view(CODES[x.element_size()])


def multipliers(device: Device) -> tuple[dict[str, Multiplier], dict[str, str]]:
    """Return what a device multiplies, by format, and why it does not multiply the others.

    `float32` is what it does with float32 operands as the process is set up now; `hal.probe.report` adds its TF32 mode.
    """
    found: dict[str, Multiplier] = {}
    refused: dict[str, str] = {}
    for format in FORMATS:
        if format in STORED:
            continue
        dtype = getattr(torch, format, None)
        if dtype is None:
            refused[format] = f"torch {torch.__version__} has no {format}"
            continue
        scaled = format.startswith("float8")
        try:
            supported = device.support("scaled_mm" if scaled else "matmul", dtype)
        except HalError as error:
            refused[format] = error.message
            continue
        if not supported:
            refused[format] = supported.reason or "unsupported"
        elif scaled:
            made = _scaled(format, dtype, device.torch_device)
            if isinstance(made, str) and format in PARTNERS:
                paired = _scaled(format, dtype, device.torch_device, PARTNERS[format])
                made = made if isinstance(paired, str) else paired
            if isinstance(made, Multiplier):
                found[format] = made
            else:
                refused[format] = made
        else:
            found[format] = Multiplier(format, device.torch_device, torch.mm, dtype, dtype)
    return found, refused


_SCALED_MULTIPLE = 16
"""Of K, which all libraries of accelerators ask for in products of 8-bit numbers (torch's `ScaledBlas.cpp`)."""


def _scaled(format: str, dtype: torch.dtype, device: torch.device, partner: str | None = None) -> Multiplier | str:
    """Return the scaled product with scales of one, in the widest type that it returns, or why it returns none."""
    one = torch.ones((), dtype=torch.float32, device=device)
    reasons: list[str] = []
    for result in (torch.float32, torch.bfloat16):

        def kernel(a: torch.Tensor, b: torch.Tensor, result: torch.dtype = result) -> torch.Tensor:
            by_columns = b.t().contiguous().t()
            return torch._scaled_mm(a.contiguous(), by_columns, scale_a=one, scale_b=one, out_dtype=result)

        made = Multiplier(format, device, kernel, dtype, result, partner=partner, multiple=_SCALED_MULTIPLE)
        try:
            made(torch.ones(64, 64, dtype=torch.float64), torch.ones(64, 64, dtype=torch.float64))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reasons.append(str(error).strip().splitlines()[0])
        else:
            return made
    return "; ".join(dict.fromkeys(reasons))
