# SPDX-License-Identifier: Apache-2.0
"""Products that add, round and cut as they are told to: what a probe must find again.

Float64 holds all that a probe asks of them: powers of two, and ones so far below a huge number that they are lost.
"""

import numpy as np
import torch

from hal.matrix_unit import FORMATS
from hal.probe.multiplier import STORED, Multiplier
from hal.probe.tree import leaf, node

CPU = torch.device("cpu")

ROUNDINGS = {
    "nearest, ties to even": np.round,
    "nearest, ties away": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "toward zero": np.trunc,
    "down": np.floor,
}


def rounded(x, bits, how="nearest, ties to even"):
    """Return float64 numbers with so many bits of significand."""
    significands, exponents = np.frexp(x)
    return np.ldexp(ROUNDINGS[how](np.ldexp(significands, bits)), exponents - bits)


def multiplier(sum_, format="bfloat16", result=None, outer=64):
    """Return a product whose sums are made by `sum_` of exact products, float64 [K, M, N]."""
    dtype = getattr(torch, STORED.get(format, format))
    result = result or (torch.float32 if format.startswith("float8") else dtype)

    def kernel(a, b):
        with np.errstate(all="ignore"):  # infinities are asked for
            products = a.double().numpy().T[:, :, None] * b.double().numpy()[:, None, :]
            return torch.from_numpy(np.ascontiguousarray(sum_(products))).to(result)

    return Multiplier(format, CPU, kernel, dtype, result, outer)


def along(tree, bits=24):
    """Return a sum along a tree: of two numbers rounded, of more cut below the largest of them."""

    def sum_(products):
        def value(at):
            if at.is_leaf:
                return products[at.leaves[0]]
            parts = np.stack([value(child) for child in at.children])
            if len(parts) > 2:
                exponents = np.where(parts == 0, -900, np.frexp(parts)[1]).max(0) - bits
                parts = np.ldexp(np.trunc(np.ldexp(parts, -exponents)), exponents)
            return rounded(parts.sum(0), bits)

        return value(tree)

    return sum_


def one_after_another(bits=24, how="nearest, ties to even", order=None, of_products=None):
    """Return a sum of one product after another."""

    def sum_(products):
        total = np.zeros(products.shape[1:])
        for k in range(len(products)) if order is None else order(len(products)):
            each = products[k] if of_products is None else rounded(products[k], of_products)
            total = rounded(total + each, bits, how)
        return total

    return sum_


def with_operands(multiply, change):
    """Return a product that changes its operands first."""
    kernel = multiply.kernel

    def changed(x):
        with np.errstate(all="ignore"):
            return torch.from_numpy(change(x.double().numpy())).to(multiply.dtype)

    return Multiplier(
        multiply.format, CPU, lambda a, b: kernel(changed(a), changed(b)), multiply.dtype, multiply.result
    )


def chain(order):
    """Return the tree of one product after another."""
    order = list(order)
    at = leaf(order[0])
    for k in order[1:]:
        at = node([at, leaf(k)])
    return at


def whole_bits(format):
    return FORMATS[STORED.get(format, format)].bits
