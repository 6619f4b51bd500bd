# SPDX-License-Identifier: Apache-2.0
"""Scaled products of 8-bit numbers on a simulated unit: torch's `_scaled_mm` and `_scaled_grouped_mm`, old and new.

The unit multiplies the numbers as they are; the scales of a whole operand, or of its rows or columns, act in float32
afterwards. Scales of blocks along K act inside of a sum, in an order that is each library's own: they are refused.

Legend: M rows, N columns, K products, R rows of all groups, G groups.
"""

from __future__ import annotations

import torch

from hal.errors import UnsupportedOperation
from hal_sim.epilogue import finished
from hal_sim.grouped import check_layout
from hal_sim.simulation import Simulation

_RECIPES = ("TensorWise", "RowWise", "BlockWise1x16", "BlockWise1x32", "BlockWise1x128", "BlockWise128x128")
"""`torch.nn.functional.ScalingType` by number."""


def scaled_mm(
    simulation: Simulation, a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    bias: torch.Tensor | None = None, scale_result: torch.Tensor | None = None, out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return a b times the scales of each, in `out_dtype`."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise RuntimeError(f"scaled_mm: {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    _of_8_bits("scaled_mm", a, b)
    if a.dtype == b.dtype == torch.float8_e5m2:  # of no chip here: AMD's have another format
        raise ValueError("scaled_mm: multiplication of two Float8_e5m2 matrices is not supported")
    _check_as_on_a_card(simulation, a, b, scale_a, scale_b, bias, out_dtype or a.dtype)
    product = simulation.product(a[None], b[None])[0]
    scales = (("scale_a", scale_a, (a.shape[0], 1)), ("scale_b", scale_b, (1, b.shape[1])))
    for name, scale, each in scales:
        if scale.numel() != 1 and tuple(scale.shape) != each:
            operands = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise _refused(simulation, "scaled_mm", f"{name} of shape {tuple(scale.shape)} beside operands {operands}")
    whole = all(scale.numel() == 1 for _, scale, _ in scales)
    if not whole and any(tuple(scale.shape) != each for _, scale, each in scales):
        raise ValueError(
            "scaled_mm: Invalid scaling configuration: scales are one number each, or one for each row of a and each "
            f"column of b, not {tuple(scale_a.shape)} and {tuple(scale_b.shape)}"
        )
    if not all(scale.is_contiguous() for _, scale, _ in scales):
        raise ValueError("scaled_mm: scales of rows and columns must be contiguous")
    if bias is not None and tuple(bias.shape) != (b.shape[1],):
        raise RuntimeError(f"scaled_mm: a bias of shape {tuple(bias.shape)}, expected {(b.shape[1],)}")
    addend = None if bias is None else bias.expand_as(product)
    product = finished(product * scale_a * scale_b, addend, 1, 1, torch.float32)
    # The result's scale acts before it is rounded, once.
    return (product if scale_result is None else product * scale_result).to(out_dtype or a.dtype)


def scaled_mm_v2(
    simulation: Simulation, a: torch.Tensor, b: torch.Tensor,
    scale_a: list[torch.Tensor], recipe_a: list[int], swizzle_a: list[int],
    scale_b: list[torch.Tensor], recipe_b: list[int], swizzle_b: list[int],
    bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None, contraction_dim: list[int] | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return what `scaled_mm` does, of scales that come with their recipes."""
    of_a = _one(simulation, "scaled_mm", scale_a, recipe_a, swizzle_a)
    of_b = _one(simulation, "scaled_mm", scale_b, recipe_b, swizzle_b)
    for name, scale, recipe, each in (
        ("scale_a", of_a, recipe_a, a.shape[0]),
        ("scale_b", of_b, recipe_b, b.shape[-1]),
    ):
        if scale.numel() != (1 if _RECIPES[recipe[0]] == "TensorWise" else each) or recipe != recipe_a:
            raise RuntimeError(f"scaled_mm: {name} has {scale.numel()} numbers for a {_RECIPES[recipe[0]]} recipe")
    rows = of_a if of_a.numel() == 1 else of_a.reshape(-1, 1)
    columns = of_b if of_b.numel() == 1 else of_b.reshape(1, -1)
    return scaled_mm(simulation, a, b, rows, columns, bias, None, out_dtype or torch.bfloat16)


def scaled_grouped_mm(
    simulation: Simulation, a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    offs: torch.Tensor | None = None, bias: torch.Tensor | None = None, scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return grouped products (see `hal_sim.grouped`) times the scales of rows and columns, in `out_dtype`.

    Args:
        simulation: whose unit.
        a, b: as for `hal_sim.grouped.grouped`.
        scale_a: float32, for each row of a: [R], or [G, M]; [G * M] with groups of K.
        scale_b: float32, for each column of b: [R], or [G, N]; [G * N] with groups of K.
        offs: the ends of the groups.
        bias, scale_result: None; no library has them.
        out_dtype: None: bfloat16.
        use_fast_accum: how a library sums; the device's schedule says that here.
    """
    if bias is not None or scale_result is not None:
        raise RuntimeError("scaled_grouped_mm: neither a bias nor a scale of the result is supported")
    _of_8_bits("scaled_grouped_mm", a, b)
    if not (a.dtype == b.dtype and "e4m3" in str(a.dtype)):
        raise ValueError(f"scaled_grouped_mm: expected two e4m3 operands, but got {a.dtype} and {b.dtype}")
    check_layout(a, b)
    product = simulation.grouped(a, b, offs)
    groups = 0 if offs is None else offs.numel()
    rows = _of_rows(scale_a, a, groups if b.ndim == 2 else 0, "scale_a")
    columns = _of_rows(scale_b, b.mT, groups if a.ndim == 2 else 0, "scale_b")
    if product.ndim == 3:
        scales = rows[:, :, None], columns[:, None]
    elif b.ndim == 3:  # groups of rows
        assert offs is not None
        scales = rows[:, None], _spread(columns, offs, a.shape[0])
    else:
        assert offs is not None
        scales = _spread(rows, offs, b.shape[1]).T, columns[None]
    return (product * scales[0] * scales[1]).to(out_dtype or torch.bfloat16)


def scaled_grouped_mm_v2(
    simulation: Simulation, a: torch.Tensor, b: torch.Tensor,
    scale_a: list[torch.Tensor], recipe_a: list[int], swizzle_a: list[int],
    scale_b: list[torch.Tensor], recipe_b: list[int], swizzle_b: list[int],
    offs: torch.Tensor | None = None, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None,
    contraction_dim: list[int] | None = None, use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return what `scaled_grouped_mm` does, of scales that come with their recipes."""
    of_a = _one(simulation, "scaled_grouped_mm", scale_a, recipe_a, swizzle_a, only="RowWise")
    of_b = _one(simulation, "scaled_grouped_mm", scale_b, recipe_b, swizzle_b, only="RowWise")
    return scaled_grouped_mm(simulation, a, b, of_a, of_b, offs, bias, None, out_dtype)


def _one(
    simulation: Simulation, what: str, scales: list[torch.Tensor], recipes: list[int], swizzles: list[int],
    only: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the one tensor of scales that act on a finished sum."""
    names = [_RECIPES[recipe] if recipe < len(_RECIPES) else f"recipe {recipe}" for recipe in recipes]
    known = (only,) if only else _RECIPES[:2]
    if len(scales) != 1 or len(names) != 1 or names[0] not in known or any(swizzles):
        raise _refused(simulation, what, f"{', '.join(names)} scales{' that are swizzled' if any(swizzles) else ''}")
    return scales[0]


_BY_ROWS_AND_COLUMNS = ("sm_89", "sm_90")
"""Architectures on which cuBLASLt has no other layout for operands of 8 bits."""


def _check_as_on_a_card(
    simulation: Simulation, a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Refuse what torch refuses on a card and takes on a CPU (aten/src/ATen/native/cuda/ScaledBlas.cpp).

    Raises:
        RuntimeError: a size is no multiple of 16, an operand lies the other way, or a dtype is not that of its place.
    """
    if a.shape[1] % 16 or b.shape[1] % 16:
        raise RuntimeError(f"scaled_mm: {tuple(a.shape)} and {tuple(b.shape)}: K and N must be multiples of 16")
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        if scale.dtype != torch.float32:
            raise RuntimeError(f"scaled_mm: {name} is {scale.dtype}, expected float32")
    along = (a.stride(1) == 1 or a.shape[1] == 1) and (b.stride(0) == 1 or b.shape[0] == 1)
    if simulation.chip.arch in _BY_ROWS_AND_COLUMNS and not along:
        raise RuntimeError("scaled_mm: only row-major times column-major matrices are supported by cuBLASLt")
    if bias is not None:
        if dtype == torch.float32:
            raise RuntimeError("scaled_mm: a bias is not supported where the result is float32")
        expected = dtype if dtype in (torch.float16, torch.bfloat16) else bias.dtype
        if bias.dtype != expected or bias.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"scaled_mm: a bias of {bias.dtype} for a result of {dtype}")


def _of_8_bits(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.element_size() != 1 or b.element_size() != 1:
        raise RuntimeError(f"{what}: operands of 8 bits are scaled, not {a.dtype} and {b.dtype}")


def _refused(simulation: Simulation, what: str, scales: str) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"{scales} are not simulated", device=simulation.device_id, what=what,
        expected="one number, or one for each row or column",
    )  # fmt: skip


def _of_rows(scale: torch.Tensor, x: torch.Tensor, groups: int, name: str) -> torch.Tensor:
    """Return scales by group and row, [G, M], or by row, [R]; `groups` where a row has one in each group of K."""
    expected = (groups * x.shape[0],) if x.ndim == 2 and groups else tuple(x.shape[:-1])
    if tuple(scale.shape) != expected or scale.dtype != torch.float32:
        raise RuntimeError(
            f"scaled_grouped_mm: {name} is {scale.dtype} {tuple(scale.shape)}, expected float32 {expected}"
        )
    return scale.view(groups, x.shape[0]) if x.ndim == 2 and groups else scale


def _spread(scales_GN: torch.Tensor, offs: torch.Tensor, extent: int) -> torch.Tensor:
    """Return, for each place of the groups' axis, the scales of its group; [R, N]."""
    lengths = torch.diff(offs.long(), prepend=offs.new_zeros(1).long())
    spread = scales_GN.repeat_interleave(lengths, 0)
    return torch.cat([spread, spread.new_ones(extent - len(spread), spread.shape[1])])
