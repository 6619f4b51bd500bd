# SPDX-License-Identifier: Apache-2.0
"""Operands on the grid of a format, and the two implementations side by side."""

import numpy as np
import torch

from hal.matrix_unit import FORMATS, MATRIX_UNITS
from hal_sim import native, product, twin

DTYPES = {
    name: getattr(torch, name, torch.float32) for name in FORMATS
}  # fmt: skip  (tf32 and hf32 are float32 until they reach the unit)

RULES = sorted({(unit, name) for units in MATRIX_UNITS.values() for name, unit in units.items()}, key=repr)
"""Every rule that differs from the others, with each format that it takes."""

KINDS = (
    "normal",
    "small range",
    "wide",
    "any bits",
    "finite bits",
    "cancelling",
    "many zeros",
    "powers of two",
    "large",
    "ends",
)


def operands(kind, shape, format, seed):
    """Return a tensor of the format's dtype."""
    rng, dtype = np.random.default_rng(seed), DTYPES[format]
    if kind.endswith("bits"):
        width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
        bits = rng.integers(0, np.iinfo(width).max, shape, dtype=width, endpoint=True)
        signed = torch.from_numpy(bits.view(f"i{dtype.itemsize}").copy())
        found = signed.view(dtype)
        return torch.where(found.float().isfinite(), found.double(), 0.0).to(dtype) if kind == "finite bits" else found
    x = rng.standard_normal(shape)
    if kind == "small range":
        x *= 2.0**-50
    elif kind == "wide":
        x *= 2.0 ** rng.integers(-30, 30, shape)
    elif kind == "many zeros":
        x *= rng.random(shape) < 0.3
    elif kind == "powers of two":
        x = np.sign(x) * 2.0 ** rng.integers(-9, 9, shape)
    elif kind == "large":
        x *= 2.0**63
    elif kind == "ends":  # of float64's range: infinite, or nothing, in the others
        x *= 2.0 ** rng.choice([-1060, -540, -480, 500, 990, 1018], shape)
    elif kind == "cancelling":
        x = np.concatenate([x, -x], -1)[..., : shape[-1]]
    return torch.from_numpy(x).to(dtype)


def addends(unit, shape, seed):
    """Return numbers to add to: zeros of both signs, tiny, ordinary and large ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.choice([-140, -60, -10, 0, 0, 0, 30, 120], shape)
    x *= rng.choice([0.0, 1.0, 1.0, 1.0], shape)
    x = torch.from_numpy(x)
    if unit.result == "float64":
        return x
    return x.half().float() if unit.result == "float16" else x.float()


def as_read(x, format):
    """Return an operand as the compiled library is given it: numbers of 16 and 8 bits as they are."""
    return x if x.element_size() <= 2 else product.operand(x, format)


def both(unit, format, a, b, c, *, reference=False):
    """Return what the compiled library computes, and what torch's own operators do."""
    least = (FORMATS[format].min_exponent,) * 2
    compiled = native.multiply(
        native.library(), as_read(a, format), as_read(b, format), c, unit, least, reference=reference
    )
    return compiled, twin.multiply(product.operand(a, format), product.operand(b, format), c, unit, least)


def differing(x, y):
    """Return where the bits differ, those of NaN among them."""
    width = {4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(width) != y.view(width)).nonzero()
