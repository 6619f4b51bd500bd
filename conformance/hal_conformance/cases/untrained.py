# SPDX-License-Identifier: Apache-2.0
"""Another case where nothing is trained: code has a way of its own there, which keeps nothing for a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.contract import Contract
from hal_conformance.case import Arrays, Footprint, Malformed, Params
from hal_conformance.cases.base import nothing_trained, observed, part, same_bits
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


class Mode(NamedTuple):
    """One way in which nothing is trained.

    Attributes:
        said: for the reader.
        context: returns what it runs in, given torch.
        given: makes the operator's argument of a copy of an input of floating point.
    """

    said: str
    context: Callable[[Any], AbstractContextManager[Any]]
    given: Callable[[torch.Tensor], torch.Tensor]


_MODES = {
    "no_grad": Mode(
        "under torch.no_grad() with inputs that require a gradient",
        lambda torch: torch.no_grad(),
        lambda tensor: tensor.requires_grad_(),
    ),
    "inference_mode": Mode("under torch.inference_mode()", lambda torch: torch.inference_mode(), lambda tensor: tensor),
    "frozen": Mode(
        "with gradients enabled where no input requires one",
        lambda torch: nullcontext(),
        lambda tensor: tensor,
    ),
}
MODES = tuple(_MODES)
IN_SERVICE = ("inference_mode",)
"""For what is special to one case: whoever asks how a tensor is used there mostly asks for gradients."""


def _other_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return others of the same kind: no multiple of them, which would have the same directions."""
    return -tensor.roll(1, -1) if tensor.dim() else -tensor


@dataclass(frozen=True)
class Untrained(Wrapped):
    """The case `inner`, for one preset, as it is, and in some modes without its backward pass.

    Before a mode's results the same tensors, as objects, held other values: a converted weight that is kept for
    evaluation must not outlive the next step of training.

    Attributes:
        results: the outputs that are no gradients. Those of each mode are judged by themselves, with the gradients of
            the one run that had some: `inner` has none, or judges them by its inputs alone, not by the results.
    """

    results: tuple[str, ...]
    modes: tuple[str, ...] = MODES

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, whose results are judged where nothing is trained, too: "
            f"{', and '.join(_MODES[mode].said for mode in self.modes)}; each time in tensors that held other "
            f"values at the call before. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(2 * inner.inputs, (1 + len(self.modes)) * inner.outputs)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: results are read after the last call, and those with the bits of training's are left out.

        Raises:
            Malformed: there is a result in training, and none in a mode.
        """
        import torch

        found, others = super().run(ops, tensors, p), {}
        for mode in self.modes:
            with _MODES[mode].context(torch), nothing_trained():
                floats = {name: _MODES[mode].given(t.clone()) for name, t in tensors.items() if t.is_floating_point()}
                with torch.no_grad():
                    for name, tensor in floats.items():
                        tensor.copy_(_other_values(tensors[name]))
                super().run(ops, tensors | floats, p)
                with torch.no_grad():
                    for name, tensor in floats.items():
                        tensor.copy_(tensors[name])
                others[mode] = observed(super().run(ops, tensors | floats, p))
        for mode, outputs in others.items():
            for name in self.results:
                if name in found and name not in outputs:
                    raise Malformed(f"{mode}: there is no output {name!r}")
        differing = {
            f"{mode}/{name}": outputs[name]
            for mode, outputs in others.items()
            for name in self.results
            if name in outputs and not (name in found and same_bits(outputs[name], found[name]))
        }
        return found | differing

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: a mode that has no results of its own has those of training, which need one verdict."""
        found = {name: array for name, array in outputs.items() if "/" not in name}
        own = {mode: part(outputs, mode) for mode in self.modes}
        return joined({
            mode: super(Untrained, self).judge(inputs, {**found, **results}, p, contract)
            for mode, results in {"trained": {}, **own}.items()
            if results or mode == "trained"
        })  # fmt: skip
