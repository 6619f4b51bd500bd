# SPDX-License-Identifier: Apache-2.0
"""A case: inputs, what to run on the device, and how the outcome is judged.

A case is a stateless module-level object with a name, so that a worker, the parent and a host that only
compares recordings all find the same one by name. `inputs` and `judge` use numpy alone and give the same result
on every host; `run` sees torch and the device, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from hal.contract import Arithmetic, Contract
    from hal_conformance.verdicts import Judgement

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
"""Names to arrays; bfloat16 as the ml_dtypes type."""

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Scale = Literal["tiny", "small", "full"]

SCALES: tuple[Scale, ...] = ("tiny", "small", "full")
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")
FAMILIES: tuple[str, ...] = (
    "contract", "router", "dispatch", "experts", "combine", "losses", "layer", "determinism",
    "norm", "rotary", "attention", "head", "gradients", "optimizer", "fp8", "trajectory",
)  # fmt: skip


@dataclass(frozen=True)
class Params:
    """Which instance of a case.

    Attributes:
        preset: a name in `hal.moe.presets.PRESETS`.
        dtype: storage dtype of activations and weights.
        scale: "full" has the published shapes; "small" and "tiny" shrink tokens and widths, not the router.
        seed: of every input; in [0, 2**32).
    """

    preset: str
    dtype: str
    scale: Scale
    seed: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of a task's large arrays; 0 where nothing grows with a model's size."""

    inputs: int = 0
    outputs: int = 0

    @property
    def host(self) -> int:
        """Bytes of host memory that the task takes: of the inputs there are one copy as arrays, one as tensors and one
        that requires a gradient; of the outputs one on its way, one received and one being judged."""
        return 3 * (self.inputs + self.outputs)


class Malformed(Exception):
    """An implementation returned, or did to its inputs, what the protocol of operators does not allow."""


class Unpromised(LookupError):
    """A bound needs the arithmetic of a dtype of which the contract says nothing."""


def arithmetic(contract: Contract, dtype: str) -> Arithmetic:
    """Return how products of a storage dtype are computed.

    Raises:
        Unpromised: the contract does not say.
    """
    try:
        return contract.matmul[dtype]
    except KeyError:
        raise Unpromised(f"the contract promises nothing of products in {dtype}") from None


class Case(Protocol):
    """One thing that the suite checks.

    Attributes:
        name: such as "router.topk_set"; a result is named f"{name}[{preset}]".
        family: one of `FAMILIES`.
        what: a paragraph for `hal conformance explain`: what it checks, the bound, its derivation, its source.
        needs: the `MoEOps` methods that `run` calls.
        multiplies: whether `hal.moe` multiplies matrices for it: on a device of which only the matrix unit is simulated
            no other case can differ from the CPU.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  documented above
    @property
    def family(self) -> str: ...  # noqa: D102
    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def needs(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def multiplies(self) -> bool: ...  # noqa: D102

    def presets(self) -> tuple[str, ...]:
        """Return the presets for which the case can differ."""
        ...

    def dtypes(self) -> tuple[str, ...]:
        """Return the storage dtypes for which the case can differ."""
        ...

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """Return the scales at which the case runs with a preset.

        What takes minutes runs at "full" alone. At "tiny", which is for a quick answer, presets are left out that
        differ in numbers only from others of the case.
        """
        ...

    def footprint(self, p: Params) -> Footprint:
        """Return how large the arrays are, without making them."""
        ...

    def inputs(self, p: Params) -> Arrays:
        """Return the inputs: a pure function of `p`, the same bits on every host."""
        ...

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """Call `ops` (some of the methods of `hal.moe.MoEOps`) on the device and return everything observed.

        `tensors` are the inputs on the device; none requires grad. What `ops` raises is the caller's to judge.
        """
        ...

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """Judge what came back: wrong keys, shapes, dtypes and values each have a verdict.

        Raises:
            Unpromised: no bound follows from the contract; nothing else is raised.
        """
        ...
