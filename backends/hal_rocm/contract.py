# SPDX-License-Identifier: Apache-2.0
"""What AMD's matrix units promise, for each architecture.

No hardware record is public. Two models agree (arXiv:2511.10909, arXiv:2512.07004): CDNA2 adds pairwise, each sum
rounded to nearest, and flushes subnormals of 16-bit products; CDNA3 aligns a group's products with 24 bits, cuts, and
rounds the group's sum down against the accumulator. That only CDNA2 flushes is in PyTorch's numerical accuracy note.
"""

from __future__ import annotations

from hal.contract import FLOAT32_ACCUMULATION, TRUNCATING_MATRIX_UNITS, Arithmetic, Contract

MODELS = "two published models agree (arXiv:2511.10909, 2512.07004)"


def contract(arch: str) -> Contract:
    """Return the contract of an architecture, such as `gfx942`."""
    if arch == "gfx90a":
        return Contract(matmul=FLOAT32_ACCUMULATION, subnormals="flushed", evidence=f"{arch}: pairwise sums; {MODELS}")
    if arch in ("gfx940", "gfx941", "gfx942"):
        # The other FP8 family: these units know only e4m3fnuz and e5m2fnuz, where the same bits mean half the value.
        fp8 = dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz"), Arithmetic(rounding="truncate"))
        return Contract(
            matmul={**TRUNCATING_MATRIX_UNITS, **fp8},
            subnormals="preserved",
            evidence=f"{arch}: groups cut at 24 bits, rounded down; {MODELS}",
        )
    return Contract(
        matmul=TRUNCATING_MATRIX_UNITS, subnormals="unspecified",
        evidence=f"{arch}: nothing published; float32 accumulation that may truncate is assumed",
        basis="assumed",
    )  # fmt: skip
