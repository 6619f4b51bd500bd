# SPDX-License-Identifier: Apache-2.0
"""Whether one product has one arithmetic: from run to run, in batches of other sizes, and with a single row or column.

All is asked with operands whose exact product is zero: each number stands in a second place with the other sign, and
its partner beside it once more. So every result is rounding alone, and another order, or another way to round, changes
most of them, in any format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from hal.errors import HalError
from hal.probe.multiplier import Multiplier, bits

ROWS, INNER, COLUMNS = 64, 256, 64
BATCHES = (1, 2, 3, 4, 8, 16, 32, 48)
"""Rows of which the same ones are computed again."""

RUNS = 5


@dataclass(frozen=True)
class Kernels:
    """What was found of one format.

    Attributes:
        deterministic: whether `RUNS` runs gave the same bits.
        differing_batches: of `BATCHES`, those in which a row has other bits than among `ROWS` rows.
        single_row: "same", "other", or why it cannot be computed.
        single_column: the same of a product with one column.
        vector: the same of a matrix times a vector (`torch.mv`).
    """

    deterministic: bool
    differing_batches: tuple[int, ...]
    single_row: str
    single_column: str
    vector: str

    @property
    def answers(self) -> Mapping[str, object]:
        """All of this as plain JSON values, without the reasons of what is refused, which are a library's words."""
        return {
            name: value.partition(":")[0] if isinstance(value, str) else value for name, value in asdict(self).items()
        }


def operands(multiply: Multiplier) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a [ROWS, INNER] and b [INNER, COLUMNS], whose exact product is zero, on the device."""
    generator = torch.Generator().manual_seed(INNER)
    half = INNER // 2
    dtype = torch.float64
    a = torch.randn(ROWS, half, generator=generator, dtype=dtype)
    b = torch.randn(half, COLUMNS, generator=generator, dtype=dtype)
    places = torch.randperm(INNER, generator=generator)
    back = torch.argsort(places)
    a, b = torch.cat([a, -a], 1)[:, back], torch.cat([b, b])[back]
    return multiply.placed(a, b)  # of which some are rounded, each as its twin is


def kernels(multiply: Multiplier) -> Kernels:
    """Compare products that should be the same."""
    a, b = operands(multiply)
    whole = _bits(multiply.kernel(a, b))
    runs = [bool((_bits(multiply.kernel(a, b)) == whole).all()) for _ in range(RUNS - 1)]
    differing = []
    for rows in BATCHES:
        try:
            same = bool((_bits(multiply.kernel(a[:rows], b)) == whole[:rows]).all())
        except (RuntimeError, HalError):
            continue  # a shape that this product does not take
        if not same:
            differing.append(rows)
    return Kernels(
        deterministic=all(runs),
        differing_batches=tuple(differing),
        single_row=_compared(lambda: multiply.kernel(a[:1], b), whole[:1]),
        single_column=_compared(lambda: multiply.kernel(a, b[:, :1].contiguous()), whole[:, :1]),
        vector="not with scales" if multiply.format.startswith("float8") else
               _compared(lambda: torch.mv(a, b[:, 0].contiguous())[:, None], whole[:, :1]),
    )  # fmt: skip


def _compared(compute: Callable[[], torch.Tensor], whole: torch.Tensor) -> str:
    try:
        got = _bits(compute())
    except (RuntimeError, HalError) as error:
        return f"refused: {str(error).strip().splitlines()[0][:120]}"
    return "same" if bool((got == whole).all()) else "other"


def _bits(x: torch.Tensor) -> torch.Tensor:
    return bits(x.cpu())


def topk_ties(device: torch.device) -> str:
    """Return which of equal numbers `torch.topk` takes: "lower index", "higher index", or "neither"."""
    generator = torch.Generator().manual_seed(INNER)
    x = torch.randint(0, 3, (64, 64), generator=generator).float()
    found = x.to(device).topk(8, dim=1).indices.cpu().sort(1).values
    for name, order in (("lower index", torch.arange(64)), ("higher index", torch.arange(63, -1, -1))):
        by_index = (x * 64 - order).sort(1, descending=True).indices[:, :8].sort(1).values
        if bool((found == by_index).all()):
            return name
    return "neither"
