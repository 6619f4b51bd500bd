# SPDX-License-Identifier: Apache-2.0
"""The parameters of a small MoE model and their gradients: what the optimiser and gradient cases share.

Dense parameters and experts, of sizes that are no multiple of a vector's width, and one of a single element. One
expert was chosen by no token: its gradient is exactly zero. The other experts' gradients, and the single element's,
are much larger than the dense ones', as where an expert sees few tokens. A third of the dense gradients is tiny, down
to 2^-60, where an optimiser's epsilon decides; some are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import F64, Array, Arrays, Params
from hal_conformance.cases.base import Base, wide

if TYPE_CHECKING:
    import torch

nonfinite = np.errstate(all="ignore")
"""Around a judge whose arithmetic meets infinities and NaN, expected ones or a device's."""

_ROWS = {"tiny": 17, "small": 31, "full": 513}
IDLE = "expert2"
"""The expert whose gradient is zero."""

EXPERTS = ("expert0", "expert1", IDLE)
DENSE = ("dense", "norm")

CHUNK = 65_536
"""Elements of a tensor that a block of a multi-tensor kernel takes, torch's and Apex's; the rest is other blocks'."""


@dataclass(frozen=True)
class Grown(Params):
    """An instance whose dense parameter has a little more than `CHUNK` elements."""


@dataclass(frozen=True)
class Mixed(Params):
    """An instance whose parameters and gradients have several dtypes, and axes from none to five."""


class ParameterCase(Base):
    """One preset stands for all, since no router is involved; parameters or gradients in float32 or bfloat16."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return ("float32", "bfloat16")


def elements(p: Params) -> int:
    """Return how many numbers all parameters hold."""
    return sum(math.prod(shape) for shape in shapes(p).values())


def shapes(p: Params) -> dict[str, tuple[int, ...]]:
    """Return the parameters' shapes."""
    if isinstance(p, Mixed):
        return {"dense": (6, 5, 2, 11), "norm": (20,), **dict.fromkeys(EXPERTS, (17, 2, 1, 2, 3)), "scalar": ()}
    if isinstance(p, Grown):
        # The idle expert is not among the last: a norm without them must be another.
        experts = dict.fromkeys((IDLE, *EXPERTS), (31, 12))
        return {"dense": (13, 5051), "norm": (20,), **experts, "scalar": (1,)}
    rows = _ROWS[p.scale]
    return {"dense": (2 * rows - 1, 20), "norm": (20,), **dict.fromkeys(EXPERTS, (rows, 12)), "scalar": (1,)}


PARAMETERS, GRADIENTS = "p", "g"
"""What the names of arrays begin with that have the dtypes of parameters, or of gradients."""

_MIXED = {
    PARAMETERS: ("own", "float32", "own", "float32", "own", "float32"),
    GRADIENTS: ("own", "own", "float32", "float32", "own", "float32"),
}
"""Dtypes in the order of `shapes`: each pair of them occurs; the first in either list is the narrower one."""


def dtypes(p: Params, kind: str) -> dict[str, str]:
    """Return the dtype of each parameter or gradient; "float32" of any other kind, which are states and sums."""
    names = tuple(shapes(p))
    if kind not in _MIXED:
        return dict.fromkeys(names, "float32")
    if not isinstance(p, Mixed):
        return dict.fromkeys(names, p.dtype)
    return {name: p.dtype if of == "own" else of for name, of in zip(names, _MIXED[kind], strict=True)}


def tensors(p: Params) -> int:
    """Return how many tensors an implementation is given; `tensor_lists.ManyTensors` cuts those of a grown instance."""
    sizes = shapes(p).values()
    return 1 + sum(map(pieces, sizes)) if isinstance(p, Grown) else len(sizes)


def pieces(shape: tuple[int, ...]) -> int:
    """Return into how many tensors a parameter is cut: one for each row, unless it fills a chunk."""
    return 1 if math.prod(shape) > CHUNK else shape[0]


def _full_bits(seed: int, stream: str, size: int) -> F64:
    """Return normal numbers that use all bits of float32."""
    return make.normal(seed, stream, size) * make.low_bits(seed, stream, size)


def distinct(array: Array) -> int:
    """Return how many numbers there are: equal ones that meet the same constants have one rounding error."""
    return len(np.unique(np.asarray(array, np.float64)))


def values(p: Params, stream: str) -> dict[str, F64]:
    """Return parameters as they are trained: normal, their sizes from 2^-8 to 1; every 16th is zero."""
    made = {}
    for name, shape in shapes(p).items():
        size = math.prod(shape)
        x = _full_bits(p.seed, f"{stream}/{name}", size)
        x *= np.ldexp(1.0, make.integers(p.seed, f"{stream}/{name}/power", -8, 0, size).astype(np.int32))
        x[make.permutation(p.seed, f"{stream}/{name}/zeros", size)[: size // 16]] = 0.0
        made[name] = x.reshape(shape)
    return made


def gradients(p: Params, stream: str) -> dict[str, F64]:
    """Return one gradient for each parameter; see above."""
    made = {}
    for name, shape in shapes(p).items():
        size = math.prod(shape)
        g = _full_bits(p.seed, f"{stream}/{name}", size) * (0.125 if name in DENSE else 8.0)
        if name == "dense":
            order = make.permutation(p.seed, "tiny gradients", size)
            power = make.integers(p.seed, f"{stream}/{name}/power", -60, -10, size).astype(np.int32)
            few = order[: size // 3]
            g[few] *= np.ldexp(1.0, power[few])
            g[order[size // 3 : size // 3 + 8]] = 0.0
            g[CHUNK:] *= 64.0  # as large as an expert's: a norm without them is another
        made[name] = np.zeros(shape) if name == IDLE else g.reshape(shape)
    return made


def stored(prefix: str, tensors: Mapping[str, F64], dtypes: Mapping[str, str]) -> Arrays:
    """Return tensors as inputs whose names begin with `prefix`."""
    return {f"{prefix}/{name}": make.store(tensor, dtypes[name]) for name, tensor in tensors.items()}


def listed(tensors: Mapping[str, torch.Tensor], prefix: str, p: Params) -> list[torch.Tensor]:
    """Return the tensors of one kind, in the parameters' order."""
    return [tensors[f"{prefix}/{name}"] for name in shapes(p)]


def flat(arrays: Arrays, prefix: str, p: Params, steps: int = 1) -> F64:
    """Return everything of one kind in float64, [steps, elements of all parameters]."""
    return np.concatenate([wide(arrays[f"{prefix}/{name}"]).reshape(steps, -1) for name in shapes(p)], axis=1)


def columns(p: Params) -> dict[str, slice]:
    """Return where each parameter's elements lie in `flat`."""
    found, start = {}, 0
    for name, shape in shapes(p).items():
        found[name] = slice(start, start + math.prod(shape))
        start += math.prod(shape)
    return found


def returned(kinds: Mapping[str, list[list[torch.Tensor]]], p: Params) -> dict[str, torch.Tensor]:
    """Return what every step gave, stacked: [steps, ...] by kind and parameter."""
    import torch

    return {
        f"{kind}/{name}": torch.stack([step[at] for step in steps])
        for kind, steps in kinds.items()
        for at, name in enumerate(shapes(p))
    }


def expected_structure(
    kinds: Iterable[str], p: Params, steps: int | None = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every output of some kinds."""
    lead = () if steps is None else (steps,)
    return {
        f"{kind}/{name}": ((*lead, *shapes(p)[name]), dtype)
        for kind in kinds
        for name, dtype in dtypes(p, kind).items()
    }
