# SPDX-License-Identifier: Apache-2.0
"""Another case where only a part is trained: adapters train no expert, and experts alone may be trained, too."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hal.contract import Contract
from hal_conformance.case import Arrays, Case, Params
from hal_conformance.cases.base import leaf, observed, part, same_results
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics import absent
from hal_conformance.numerics.detectors import joined
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
            trained alone, and then all but one, for each of them.
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
        how = "each input trained alone, everything else being frozen, and each one frozen alone"
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
        all_but_one = [tuple(other for other in names if other != name) for name in names]
        return [*((name,) for name in names), *(all_but_one if len(names) > 2 else ())]

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: what a pass gives has its name where a result has not the bits of the first pass's, or
        a gradient not those of an earlier pass.
        """
        names = self.inner.names(tensors)
        first: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        for number, trained in enumerate(self.passes(names), 1):
            leaves = {name: leaf(tensors[name]) for name in trained}
            frozen = {name: tensors[name].detach() for name in names if name not in trained}
            twice = self.twice and number % 2 == 0
            given = {**tensors, **frozen, **leaves}
            once = observed(self.inner.there_and_back(ops, given, p)) if twice else {}
            own = observed(self.inner.there_and_back(ops, given, p, -0.5 if twice else 1.0))
            gradients = {f"d{name}": tensor.grad for name, tensor in leaves.items()}
            if twice:
                gradients = {name: None if grad is None else grad * 2 for name, grad in gradients.items()}
            unasked = {f"{UNASKED}/d{name}": tensor.grad for name, tensor in frozen.items()}
            first = first or own
            if twice and not same_results(once, first):
                found |= {f"{CALL} {number}/{name}": tensor for name, tensor in once.items()}
            given_back = observed(gradients)
            before = {name: found[name] for name in given_back if name in found}
            whole = len(given_back) == len(trained)
            alike = same_results(own, first) and same_results({name: given_back[name] for name in before}, before)
            label = "" if whole and alike else f"{PASS} {number}/"
            found |= {f"{label}{name}": tensor for name, tensor in {**own, **given_back}.items()}
            found |= observed(unasked)
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: gradients are judged with the results of their own pass, since oracles start from these."""
        unasked = part(outputs, UNASKED)
        if unasked:
            return Judgement(Status.FAIL_STRUCTURE, detail=f"frozen, and has a gradient: {', '.join(unasked)}")
        passes = dict(enumerate(self.passes(self.inner.names(inputs)), 1))
        own = {number: part(outputs, f"{PASS} {number}") for number in passes}
        alike = {name for number, names in passes.items() if not own[number] for name in names}
        found = {name: array for name, array in outputs.items() if "/" not in name}
        judged = {"first results": self._judged(inputs, found, p, contract, alike)}
        for number, names in passes.items():
            if own[number]:
                judged[f"{PASS} {number}"] = self._judged(inputs, own[number], p, contract, names)
            if results := part(outputs, f"{CALL} {number}"):
                judged[f"{CALL} {number}"] = self._judged(inputs, results, p, contract, ())
        return joined(judged) if len(judged) > 1 else judged["first results"]

    def _judged(
        self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract, trained: Container[str]
    ) -> Judgement:
        """Judge results, and the gradients of what was trained with them."""
        others = {f"d{name}": inputs[name] for name in self.inner.names(inputs) if name not in trained}
        if not others:
            return self.inner.judge(inputs, outputs, p, contract)
        if whole := absent.is_whole():
            outputs = {name: absent.present(array) for name, array in outputs.items()}
        blanks = {name: absent.blank(array.shape, array.dtype) for name, array in others.items()}
        with absent.partial(arrays=whole):
            return self.inner.judge(inputs, {**outputs, **blanks}, p, contract)


UNASKED = "unasked"
PASS = "pass"
CALL = "first call of pass"
