# SPDX-License-Identifier: Apache-2.0
"""Another case where only a part is trained: adapters train no expert, and experts alone may be trained, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hal.contract import Contract
from hal_conformance.case import Array, Arrays, Case, Params
from hal_conformance.cases.base import leaf, observed
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


class Trainable(Case, Protocol):
    """A case with a backward pass."""

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the inputs that have gradients."""
        ...

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Run forward and backward, the upstream gradients times a factor; return the results."""
        ...

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shapes and dtypes."""
        ...


@dataclass(frozen=True)
class Frozen(Wrapped):
    """The case `inner`, some inputs trained without the others, and then the others without these.

    The others twice, where gradients are exact: the second gradient is minus half of the first and is added to it, so
    that half of it is left, exactly. A gradient in a buffer that the second pass overwrites shows.

    Attributes:
        first: what is trained at first.
        twice: whether the others have two passes; not where a pass is rounded, since an honest second one need not have
            the bits of the first.
    """

    inner: Trainable
    first: tuple[str, ...]
    twice: bool = True

    @property
    def what(self) -> str:
        """See `Case.what`."""
        first = " and ".join(self.first)
        again = ", where a second backward pass adds minus half of the gradient to what is there" if self.twice else ""
        return (
            f"As {self.inner.name}, with {first} trained and everything else frozen, then the reverse{again}. "
            f"Gradients that are asked for are those of {self.inner.name}; there are no others."
        )

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.inner.names(tensors)}
        frozen = {name: tensors[name].detach() for name in leaves}
        then = [name for name in leaves if name not in self.first]
        found = self.inner.there_and_back(ops, {**tensors, **frozen, **{n: leaves[n] for n in self.first}}, p)
        for factor in (1.0, -0.5) if self.twice else (1.0,):
            self.inner.there_and_back(ops, {**tensors, **frozen, **{n: leaves[n] for n in then}}, p, factor)
        unasked = {f"{UNASKED}{name}": tensor.grad for name, tensor in frozen.items()}
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}, **unasked})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.inner.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        unasked = [name.removeprefix(UNASKED) for name in outputs if name.startswith(UNASKED)]
        if unasked:
            return Judgement(Status.FAIL_STRUCTURE, detail=f"frozen, and has a gradient: {', '.join(unasked)}")
        others = [name for name in self.inner.names(inputs) if name not in self.first]
        halves = [f"d{name}" for name in others if self.twice]
        return self.inner.judge(inputs, {**outputs, **{name: _doubled(outputs[name]) for name in halves}}, p, contract)


UNASKED = "unasked/"


def _doubled(gradient: Array) -> Array:
    with np.errstate(all="ignore"):  # a device's gradient may be anything
        # The bits of a NaN stay: they say that a recording does not hold the element (`absent`).
        return np.where(np.isnan(gradient), gradient, gradient * np.asarray(2, gradient.dtype))
