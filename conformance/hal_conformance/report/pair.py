# SPDX-License-Identifier: Apache-2.0
"""Two devices: elements that differ, tokens that go to other experts, training runs that part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hal_conformance import arrays as codec
from hal_conformance.case import Array

if TYPE_CHECKING:
    from typing_extensions import Self


class _Counts:
    """Numbers that are added one by one."""

    def __iadd__(self, other: Self) -> Self:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)
        return self


@dataclass
class Elements(_Counts):
    """Elements of one dtype.

    Attributes:
        compared: how many; not those that are zero on both.
        differing: of these, in a bit; a NaN is equal to any other, and a zero to one of the other sign.
        smaller, larger: of the differing ones, those whose magnitude is smaller, or larger, on the second device.
    """

    compared: int = 0
    differing: int = 0
    smaller: int = 0
    larger: int = 0

    @property
    def share(self) -> float | None:
        """The share of elements that differ; None where none was compared."""
        return self.differing / self.compared if self.compared else None

    @property
    def bias(self) -> float | None:
        """From -1, where what differs is always smaller on the second device, to 1; 0 where neither is favoured."""
        moved = self.smaller + self.larger
        return (self.larger - self.smaller) / moved if moved else None

    def add(self, one: Array, other: Array) -> None:
        """Count the elements of an output."""
        some = (one != 0) | (other != 0)
        differing = some & (codec.bits(one) != codec.bits(other))
        a, b = (x[differing].astype(np.float64) for x in (one, other))
        self.compared += int(some.sum())
        self.differing += int((~(np.isnan(a) & np.isnan(b))).sum())
        self.smaller += int((np.abs(b) < np.abs(a)).sum())
        self.larger += int((np.abs(b) > np.abs(a)).sum())


@dataclass
class Tokens(_Counts):
    """Tokens that both devices routed by themselves.

    Attributes:
        compared: how many.
        rerouted: of these, with another set of experts.
        certain: of the rerouted ones, those that have one right set by both contracts: one of the devices is wrong.
    """

    compared: int = 0
    rerouted: int = 0
    certain: int = 0


@dataclass(frozen=True)
class Parting:
    """Two training runs from one start.

    Attributes:
        first: the first step whose losses differ, counted from 1; None: none does.
        largest: the largest difference of a step's losses; None: one is not finite.
        steps: of each run.
    """

    case: str
    dtype: str
    first: int | None
    largest: float | None
    steps: int


@dataclass
class Pair:
    """Two subjects.

    Attributes:
        a, b: their labels.
        elements: by the dtype in which they are stored.
    """

    a: str
    b: str
    elements: dict[str, Elements] = field(default_factory=dict)
    tokens: Tokens = field(default_factory=Tokens)
    partings: list[Parting] = field(default_factory=list)

    @property
    def all_elements(self) -> Elements:
        """Those of every dtype together."""
        found = Elements()
        for of_dtype in self.elements.values():
            found += of_dtype
        return found

    def __iadd__(self, other: Pair) -> Pair:
        """Add what was found of the same two subjects in other tasks."""
        for dtype, of_dtype in other.elements.items():
            self.elements.setdefault(dtype, Elements()).__iadd__(of_dtype)
        self.tokens += other.tokens
        self.partings += other.partings
        return self

    def as_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        elements = {dtype: {**vars(e), "bias": e.bias} for dtype, e in self.elements.items()}
        partings = [dict(vars(parting)) for parting in self.partings]
        return {"a": self.a, "b": self.b, "elements": elements, "tokens": dict(vars(self.tokens)), "partings": partings}
