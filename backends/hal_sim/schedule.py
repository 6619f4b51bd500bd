# SPDX-License-Identifier: Apache-2.0
"""In which pieces a library sums a long dot product, on top of what the matrix unit does with each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hal.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """How K products are shared out. Each piece starts from zero; the pieces are added in float32, in the order of k.

    The default is one piece, k ascending: what cuBLAS does with aligned operands unless it splits K.

    Attributes:
        split_k: slices of K, which different processors compute. A slice is a multiple of `grain`, so that there may be
            fewer: ceil(ceil(K / grain) / split_k) grains each.
        grain: products, 64 of 16-bit operands and 128 of 8-bit ones in cuBLASLt; None is that.
        promote: products after which the unit's own sum is added to an accumulator outside of it; None: never. FP8
            kernels on Hopper do so every 128.
    """

    split_k: int = 1
    grain: int | None = None
    promote: int | None = None

    def pieces(self, K: int, itemsize: int) -> Iterator[list[slice]]:
        """Yield, for each slice of K, the pieces whose sums are added to one another first."""
        grain = self.grain or (128 if itemsize == 1 else 64)
        length = max(1, math.ceil(math.ceil(K / grain) / self.split_k)) * grain
        for start in range(0, K, length):
            end = min(start + length, K)
            step = self.promote or length
            yield [slice(k, min(k + step, end)) for k in range(start, end, step)]

    def __str__(self) -> str:
        named = {"splitk": self.split_k if self.split_k > 1 else None, "grain": self.grain, "promote": self.promote}
        return "/".join(f"{name}={value}" for name, value in named.items() if value is not None) or "k ascending"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read `splitk=4`, or several such, with slashes between them.

        Raises:
            ConfigError: another name, or a value that is no positive number.
        """
        names = {"splitk": "split_k", "grain": "grain", "promote": "promote"}
        found: dict[str, int] = {}
        for part in text.split("/"):
            matched = re.fullmatch(r"([a-z]+)=([1-9][0-9]{0,8})", part)
            if matched is None or matched[1] not in names or names[matched[1]] in found:
                raise ConfigError(
                    f"no such option: {text!r}",
                    expected="splitk=N, grain=N, promote=N, strict, memory=24GiB, count=N, slashes between",
                )
            found[names[matched[1]]] = int(matched[2])
        return cls(**found)
