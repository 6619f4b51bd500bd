# SPDX-License-Identifier: Apache-2.0
"""The product of rows that are sorted by expert with each expert's matrix; differentiable."""

from __future__ import annotations

import torch

from hal.launch.replacements.finder import stands_in


def gmm(
    a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_a: bool = False, trans_b: bool = False
) -> torch.Tensor:
    """Return the rows [N, O] of [N, I] times [E, I, O], or [E, O, I] with `trans_b`.

    With `trans_a` the experts' products [E, I, O] of [N, I] transposed and [N, O], as for gradients of weights.

    Args:
        a: rows in the order of their experts.
        b: matrices, or rows with `trans_a`.
        batch_sizes: int64 [E] on the host, rows of each expert.
        trans_a, trans_b: one of them at most.
    """
    if trans_a and trans_b:
        raise ValueError("gmm: trans_a and trans_b exclude each other")
    stands_in("grouped_gemm.ops.gmm", "one product of torch's for each expert")
    sizes = batch_sizes.tolist()
    rows = a.split(sizes)
    if trans_a:
        return torch.stack([mine.t() @ other for mine, other in zip(rows, b.split(sizes), strict=True)])
    matrices = b.transpose(1, 2) if trans_b else b
    return torch.cat([mine @ matrix for mine, matrix in zip(rows, matrices, strict=True)])
