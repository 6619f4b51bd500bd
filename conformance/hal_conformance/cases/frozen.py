# SPDX-License-Identifier: Apache-2.0
"""Another case where only a part is trained: adapters train no expert, and experts alone may be trained, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hal.contract import Contract
from hal_conformance.case import Arrays, Case, Params
from hal_conformance.cases.base import leaf, observed, part, same_bits
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.detectors import joined
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
    """The case `inner` in passes that train some inputs without the others.

    Attributes:
        first: what is trained in the first of two passes, the others being trained in the second. Empty: each input is
            trained alone, so that whatever another one's gradient is computed along with is frozen in some pass.
        twice: whether a second backward pass adds minus half of the gradient to what is there, so that half of it is
            left: a gradient in a buffer that the second one overwrites shows. Every other pass does so. Not where
            gradients are rounded, since an honest second one need not have the bits of the first.
    """

    inner: Trainable
    first: tuple[str, ...] = ()
    twice: bool = False

    @property
    def what(self) -> str:
        """See `Case.what`."""
        how = "each input trained alone, everything else being frozen"
        if self.first:
            how = f"{' and '.join(self.first)} trained and everything else frozen, then the reverse"
        again = ", where a second backward pass adds minus half of the gradient to what is there" if self.twice else ""
        return (
            f"As {self.inner.name}, with {how}{again}. Results, and gradients that are asked for, are those of "
            f"{self.inner.name}; there are no others."
        )

    def passes(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the inputs that each pass trains, of all that have gradients."""
        if self.first:
            return [self.first, tuple(name for name in names if name not in self.first)]
        return [(name,) for name in names]

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: what has the bits of an earlier pass is left out."""
        names = self.inner.names(tensors)
        found: dict[str, torch.Tensor] = {}
        for number, trained in enumerate(self.passes(names)):
            leaves = {name: leaf(tensors[name]) for name in trained}
            frozen = {name: tensors[name].detach() for name in names if name not in trained}
            twice = self.twice and number % 2
            for factor in (1.0, -0.5) if twice else (1.0,):
                results = self.inner.there_and_back(ops, {**tensors, **frozen, **leaves}, p, factor)
            gradients = {f"d{name}": tensor.grad for name, tensor in leaves.items()}
            if twice:
                gradients = {name: None if grad is None else grad * 2 for name, grad in gradients.items()}
            unasked = {f"{UNASKED}/{name}": tensor.grad for name, tensor in frozen.items()}
            for name, tensor in observed({**results, **gradients, **unasked}).items():
                if name not in found:
                    found[name] = tensor
                elif not same_bits(tensor, found[name]):
                    found[f"pass {number + 1}/{name}"] = tensor
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: a pass whose results have other bits has them judged with the rest of the first ones."""
        unasked = part(outputs, UNASKED)
        if unasked:
            return Judgement(Status.FAIL_STRUCTURE, detail=f"frozen, and has a gradient: {', '.join(unasked)}")
        found = {name: array for name, array in outputs.items() if "/" not in name}
        own = {name.partition("/")[0]: part(outputs, name.partition("/")[0]) for name in outputs if "/" in name}
        if not own:
            return self.inner.judge(inputs, found, p, contract)
        return joined({
            name: self.inner.judge(inputs, {**found, **changed}, p, contract)
            for name, changed in {"first results": {}, **own}.items()
        })  # fmt: skip


UNASKED = "unasked"
