# SPDX-License-Identifier: Apache-2.0
"""Whole products of one device against those of another, bit by bit: how far a simulated unit predicts a real card.

The operands are made from a counter, so that both halves can be computed on different machines: `hal probe D --record
F` needs no simulator, and `hal probe --predict S --against F` no device. A library may take another kernel, or split K,
for any shape; so shapes come in classes, and each is reported by itself.

Shapes: M rows, K products, N columns, written MxKxN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

import hal
from hal import philox
from hal.errors import HalError
from hal.matrix_unit import FORMATS
from hal.probe.multiplier import Multiplier, bits, multipliers

Shape = tuple[int, int, int]

CLASSES: Mapping[str, tuple[Shape, ...]] = {
    "aligned": (
        (64, 64, 64), (128, 128, 128), (256, 256, 256), (128, 512, 256), (256, 1024, 128), (512, 512, 64),
        (64, 768, 192), (192, 320, 448),
    ),
    "unaligned": (
        (65, 100, 63), (127, 129, 131), (100, 300, 52), (250, 250, 250), (96, 67, 96), (96, 96, 70), (33, 513, 77),
    ),
    "tiny M or N": (
        (1, 512, 256), (2, 512, 256), (4, 1024, 128), (8, 512, 512), (256, 512, 1), (256, 512, 2), (512, 256, 8),
        (1, 64, 1), (8, 2048, 8),
    ),
    "large K": ((64, 4096, 64), (64, 8192, 64), (16, 16384, 64), (128, 5000, 64), (32, 32768, 32)),
}  # fmt: skip
"""Aligned: all three are multiples of 64, which is what a library's own kernels like best; tiny: another kernel is
likely; large K: K is likely to be split."""

SEED = 0


@dataclass(frozen=True)
class Products:
    """All products of one device.

    Attributes:
        source: device or file, for messages.
        device: facts about it.
        versions: of what decides results.
        results: by "format/MxKxN", where a format is `Multiplier.name`.
        refused: the same for products that the device does not compute, with the reason.
    """

    source: str
    device: Mapping[str, object]
    versions: Mapping[str, str | None]
    results: Mapping[str, torch.Tensor]
    refused: Mapping[str, str]


def key(multiplier: str, shape: Shape) -> str:
    """Return the name of one product."""
    return f"{multiplier}/{'x'.join(map(str, shape))}"


def operands(name: str, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a [M, K] and b [K, N], float64, the same on every host.

    Their exact product is zero, as in `hal.probe.kernels`: normal numbers, each a second time with the other sign. So
    every element is rounding alone. (With independent numbers, 99.9 % of elements agree in bfloat16 between any two
    units, which says little.)
    """
    M, K, N = shape
    half = K // 2
    x, y = _normal(f"a/{name}", M, half), _normal(f"b/{name}", half, N)
    a, b = torch.cat([x, -x, torch.zeros(M, K % 2)], 1), torch.cat([y, y, torch.ones(K % 2, N)])
    places = torch.from_numpy(philox.uniform(SEED, f"k/{name}", K)).argsort(stable=True)
    return a[:, places], b[places]


def _normal(stream: str, rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(philox.normal(SEED, stream, rows * columns)).double().reshape(rows, columns)


def computed(name: str, formats: Sequence[str] = ()) -> Products:
    """Open a device and compute all products of these formats; without any, those of 16 and 8 bits.

    Raises:
        HalError: the device cannot be opened.
    """
    with hal.open_device(name) as device:
        found, refused = multipliers(device)
        wanted = formats or [format for format in found if format not in ("float32", "float64")]
        missing = {format: refused.get(format, "no such format") for format in wanted if format not in found}
        results: dict[str, torch.Tensor] = {}
        for format in wanted:
            for shape in _shapes() if format in found else ():
                _compute(found[format], shape, results, missing)
        return Products(name, device.info.as_json(), device.versions(), results, missing)


def _compute(multiply: Multiplier, shape: Shape, results: dict[str, torch.Tensor], refused: dict[str, str]) -> None:
    name = key(multiply.name, shape)
    try:
        results[name] = multiply.raw(*operands(name, shape))
    except (RuntimeError, HalError) as error:
        refused[name] = str(error).strip().splitlines()[0]


def _shapes() -> Iterator[Shape]:
    for shapes in CLASSES.values():
        yield from shapes


@dataclass(frozen=True)
class Agreement:
    """How the products of one format and class agree.

    Attributes:
        format: of the operands (`Multiplier.name`).
        kind: key of `CLASSES`.
        shapes: that both have.
        equal_shapes: of which all bits are equal.
        elements: in all of them.
        equal_elements: of equal bits.
        differing: shapes that differ, each with its share of equal elements.
    """

    format: str
    kind: str
    shapes: int
    equal_shapes: int
    elements: int
    equal_elements: int
    differing: Mapping[str, float]

    @property
    def share(self) -> float:
        """Equal elements of all."""
        return self.equal_elements / max(1, self.elements)

    def as_json(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {**self.__dict__, "differing": dict(self.differing), "share": self.share}


def compare(one: Products, other: Products) -> list[Agreement]:
    """Return how far two devices agree, for every format and class of shapes that both have."""
    both = {name.split("/")[0] for name in one.results if name in other.results}
    found = []
    order = list(FORMATS)
    for format in sorted(both, key=lambda name: order.index(name.split()[0])):
        for kind, shapes in CLASSES.items():
            names = [key(format, shape) for shape in shapes]
            shares = {name: _equal(one.results[name], other.results[name]) for name in names
                      if name in one.results and name in other.results}  # fmt: skip
            if shares:
                found.append(_agreement(format, kind, shares))
    return found


def _agreement(format: str, kind: str, shares: Mapping[str, tuple[int, int]]) -> Agreement:
    differing = {name.split("/")[1]: equal / all_ for name, (equal, all_) in shares.items() if equal < all_}
    return Agreement(
        format, kind, len(shares), len(shares) - len(differing), sum(all_ for _, all_ in shares.values()),
        sum(equal for equal, _ in shares.values()), differing,
    )  # fmt: skip


def _equal(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """Return how many elements have equal bits, of how many; none if the dtypes differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return 0, one.numel()
    return int((bits(one) == bits(other)).sum()), one.numel()
