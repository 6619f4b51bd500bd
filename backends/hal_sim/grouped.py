# SPDX-License-Identifier: Apache-2.0
"""Grouped products on a simulated unit: one for each expert, over slices of rows, of columns or of K.

Groups in batches of about a size, or all in one call where there is one for that: an expert with a few tokens costs
less than a call.

Legend: R rows of all groups, G groups, M rows, N columns, K products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The product of [B, M, K] and [B, K, N] in the accumulator's format."""
Lengths = Sequence[tuple[int, int]]
"""The first place and the length of each group."""
Together = Callable[[torch.Tensor, torch.Tensor, Lengths, bool], torch.Tensor]
"""Products of [R, K] and [G, K, N], or of [M, R] and [R, N], by groups of R; last, whether the two are exchanged."""


def grouped(
    product: Product, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None, together: Together | None = None
) -> torch.Tensor:
    """Return the products of groups, in the accumulator's format.

    Args:
        product: of batches.
        a: [R, K] with groups of rows, [M, R] with groups of columns, or [G, M, K].
        b: [R, N] with groups of rows, [K, R] with groups of columns, or [G, K, N].
        ends: int32 [G], where each group ends in the axis of R; None: both have one matrix for each group.
        together: of all groups; None: `product` of each.

    Returns:
        [R, N], [M, R] or [G, M, N]. What no group has is zero.

    Raises:
        RuntimeError: the shapes or the ends do not go together.
    """
    if ends is None:
        if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
            raise RuntimeError(f"grouped: {_shape(a)} and {_shape(b)} cannot be multiplied without offsets")
        return product(a, b)
    if a.ndim == 2 and b.ndim == 3:
        return _of_rows(product, together, a, b, _lengths(ends, a.shape[0], b.shape[0]), False)
    if a.ndim == 3 and b.ndim == 2:
        lengths = _lengths(ends, b.shape[1], a.shape[0])
        return _of_rows(lambda x, y: product(y.mT, x.mT).mT, together, b.T, a.mT, lengths, True).T
    if a.ndim == 2 and b.ndim == 2:
        return _of_products(product, together, a, b, _lengths(ends, a.shape[1], ends.numel()))
    raise RuntimeError(f"grouped: {_shape(a)} and {_shape(b)} have no groups in common")


def check_layout(*operands: torch.Tensor) -> None:
    """Refuse what torch's own kernels refuse (aten/src/ATen/native/GroupedMMUtils.h).

    Raises:
        RuntimeError: the matrices of an operand are neither in rows nor in columns (an expanded gradient, such as that
            of `y.sum()`), or their rows or columns lie no multiple of 16 bytes apart.
    """
    for x in operands:
        (rows, columns), sizes = x.stride()[-2:], x.shape[-2:]
        if rows == 1 and columns >= max(1, sizes[0]):
            apart = columns
        elif columns == 1 and rows >= max(1, sizes[1]):
            apart = rows
        else:
            raise RuntimeError(
                f"Invalid strides/sizes, got {list(x.stride())} for strides and {list(x.shape)} for sizes"
            )
        if apart * x.element_size() % 16:
            raise RuntimeError(f"strides should be multiple of 16 bytes, got {list(x.stride())} of {x.dtype}")


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _lengths(ends: torch.Tensor, extent: int, groups: int) -> list[tuple[int, int]]:
    """Return the first place and the length of each group."""
    if ends.ndim != 1 or ends.dtype != torch.int32 or ends.numel() != groups:
        raise RuntimeError(
            f"grouped: {groups} int32 offsets are needed, one for each group; these are {ends.dtype} {_shape(ends)}"
        )
    last = [0, *ends.tolist()]
    pairs = list(itertools.pairwise(last))
    if any(first > end for first, end in pairs) or last[-1] > extent:
        raise RuntimeError(f"grouped: the offsets must ascend from 0 to at most {extent}, and are {last[1:]}")
    return [(first, end - first) for first, end in pairs]


def _of_rows(
    product: Product, together: Together | None, a_RK: torch.Tensor, b_GKN: torch.Tensor, lengths: Lengths,
    exchanged: bool,
) -> torch.Tensor:  # fmt: skip
    if a_RK.shape[1] != b_GKN.shape[1]:
        raise RuntimeError(f"grouped: {_shape(a_RK)} and {_shape(b_GKN)} cannot be multiplied")
    if together is not None:
        return together(a_RK, b_GKN, lengths, exchanged)
    out_RN = product(a_RK[None, :, :0], b_GKN.new_empty(1, 0, b_GKN.shape[2]))[0]
    _, K, N = b_GKN.shape
    for groups in _of_a_size(lengths, max(1, _ELEMENTS // max(1, K * N))):
        first, length = torch.tensor([lengths[group] for group in groups]).mT[:, :, None]
        rows = first + torch.minimum(torch.arange(int(length.max())), length - 1)  # the last ones more than once
        out_RN[rows] = product(a_RK[rows], b_GKN[groups])
    return out_RN


_ELEMENTS = 1 << 20
"""Of the copies of operands that a batch of groups takes."""


def _of_a_size(lengths: Lengths, most: int) -> Iterator[list[int]]:
    """Yield groups whose lengths are less than a factor of two apart: one batch of them costs less than each alone.

    Args:
        lengths: of all groups.
        most: groups of a batch.
    """
    alike: dict[int, list[int]] = {}
    for group, (_, length) in enumerate(lengths):
        alike.setdefault(length.bit_length(), []).append(group)
    alike.pop(0, None)
    for groups in alike.values():
        yield from (groups[first : first + most] for first in range(0, len(groups), most))


def _of_products(
    product: Product, together: Together | None, a_MR: torch.Tensor, b_RN: torch.Tensor, lengths: Lengths
) -> torch.Tensor:
    (M, R), N = a_MR.shape, b_RN.shape[1]
    if b_RN.shape[0] != R:
        raise RuntimeError(f"grouped: {_shape(a_MR)} and {_shape(b_RN)} cannot be multiplied")
    if together is not None:
        return together(a_MR, b_RN, lengths, False)
    out_GMN = product(a_MR[None, :, :0].expand(len(lengths), M, 0), b_RN[None, :0].expand(len(lengths), 0, N))
    for group, (first, length) in enumerate(lengths):
        if length:
            inner = slice(first, first + length)
            out_GMN[group] = product(a_MR[None, :, inner], b_RN[None, inner])[0]
    return out_GMN
