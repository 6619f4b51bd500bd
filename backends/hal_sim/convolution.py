# SPDX-License-Identifier: Apache-2.0
"""Convolutions as products of matrices: each window of the input is a column, K is channels times window.

That is what implicit GEMM kernels compute, in the order in which memory has channels and window; a library may take
another. Gradients of the input are products whose overlapping windows are added in the accumulator's format.

Shapes: N images of C channels, D output channels, G groups; L places of the output, W of the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _both_and(rest: Iterable[Any]) -> tuple[Any, ...]:
    """Return an index of all images and channels (or groups and channels), and of some places."""
    return (slice(None), slice(None), *rest)


def _windows(x: torch.Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> torch.Tensor:
    """Return [N, C, places..., window...] of a padded input, as a view."""
    for axis, (size, step, spread) in enumerate(zip(window, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * spread + 1, step)[..., ::spread]
    return x


def _columns(x: torch.Tensor, axes: int, groups: int) -> torch.Tensor:
    """Return windows [N, C, places..., window...] as matrices [G, C / G * W, N * L]."""
    N, C = x.shape[:2]
    places, window = x.shape[2 : 2 + axes], x.shape[2 + axes :]
    x = x.reshape(N, groups, C // groups, math.prod(places), math.prod(window))
    return x.permute(1, 2, 4, 0, 3).reshape(groups, C // groups * math.prod(window), N * math.prod(places))


def _padded(x: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    return F.pad(x, [side for size in reversed(padding) for side in (size, size)])


def _rows(y: torch.Tensor, groups: int) -> torch.Tensor:
    """Return [N, D, places...] as matrices [G, D / G, N * L]."""
    N, D = y.shape[:2]
    return y.reshape(N, groups, D // groups, -1).permute(1, 2, 0, 3).reshape(groups, D // groups, -1)


def convolved(
    product: Product, x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """Return the convolution in the accumulator's format."""
    axes, N, D = x.ndim - 2, x.shape[0], weight.shape[0]
    windows = _windows(_padded(x, padding), weight.shape[2:], stride, dilation)
    places = windows.shape[2 : 2 + axes]
    found = product(weight.reshape(groups, D // groups, -1), _columns(windows, axes, groups))
    return found.view(D, N, *places).transpose(0, 1)


def gradient_of_input(
    product: Product, dy: torch.Tensor, size: Sequence[int], weight: torch.Tensor, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of an input of `size`, in the accumulator's format."""
    N, C, D = dy.shape[0], size[1], weight.shape[0]
    window, places = weight.shape[2:], dy.shape[2:]
    matrices = weight.reshape(groups, D // groups, -1).transpose(1, 2)
    parts = product(matrices, _rows(dy, groups)).view(groups, C // groups, *window, N, *places)
    dx = parts.new_zeros(N, C, *(full + 2 * pad for full, pad in zip(size[2:], padding, strict=True)))
    for at in itertools.product(*map(range, window)):
        part = parts[_both_and(at)].flatten(0, 1).transpose(0, 1)
        where = [
            slice(i * spread, i * spread + (n - 1) * step + 1, step)
            for i, spread, n, step in zip(at, dilation, places, stride, strict=True)
        ]
        dx[_both_and(where)] += part
    inside = [slice(pad, pad + full) for full, pad in zip(size[2:], padding, strict=True)]
    return dx[_both_and(inside)]


def gradient_of_weight(
    product: Product, dy: torch.Tensor, x: torch.Tensor, size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of a weight of `size`, in the accumulator's format."""
    axes = x.ndim - 2
    windows = _windows(_padded(x, padding), size[2:], stride, dilation)
    # An input may have rows that no window reaches in full; those of the gradient are what counts.
    windows = windows[_both_and(map(slice, dy.shape[2:]))]
    columns = _columns(windows, axes, groups)
    return product(_rows(dy, groups), columns.transpose(1, 2)).reshape(*size)
