# SPDX-License-Identifier: Apache-2.0
"""What NVIDIA's matrix units promise, for each generation.

Sources: arXiv:2511.10909 and arXiv:2512.07004, whose rules give recorded products of V100, A100, A2, Ada, L40S, H100,
H200 and B200 bit by bit. The products of a group are aligned to the largest exponent and cut off there, and the sum
is cut to float32. For FP8, Ada and Hopper keep 13 fraction bits of the sum, Blackwell's data-centre unit all of them.
"""

from __future__ import annotations

from hal.contract import TRUNCATING_MATRIX_UNITS, Arithmetic, Contract

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_RECORDED = ((7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0))


def contract(major: int, minor: int) -> Contract:
    """Return the contract of the generation with this compute capability; an unrecorded one promises less."""
    matmul = dict(TRUNCATING_MATRIX_UNITS)
    if (major, minor) in ((8, 9), (9, 0)):
        matmul.update(dict.fromkeys(_FP8, Arithmetic(accumulator_bits=14, rounding="truncate")))
    elif (major, minor) == (10, 0):
        matmul.update(dict.fromkeys(_FP8, Arithmetic(rounding="truncate")))
    if (major, minor) in _RECORDED:
        return Contract(
            matmul=matmul,
            subnormals="preserved",  # none of those rules flushes
            evidence=f"sm_{major}{minor}: recorded products, cut to at least 24 bits (arXiv:2511.10909, 2512.07004); "
            "float32 products in float32",
        )
    return Contract(
        matmul=matmul, subnormals="unspecified",
        evidence=f"sm_{major}{minor}: no recorded products; assumed to cut as every recorded generation does",
        basis="assumed",
    )  # fmt: skip
