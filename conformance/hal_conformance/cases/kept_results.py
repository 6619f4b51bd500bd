# SPDX-License-Identifier: Apache-2.0
"""Another case among calls of the same with other values: what an operator keeps from one call to another is wrong.

Results in a buffer that the next call writes into are lost; so is what a backward pass needs, if it lies in the
operator and not in the graph. A converted weight or a plan that is kept for a tensor at some address is stale when the
optimizer, or the next batch, has written into it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.arguments import has_elements
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases.base import before_backward, observed, part, same_bits
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

THEN = "then"
AGAIN = "again"


class KeptResults(Wrapped):
    """The case `inner`, for one preset, run with its own inputs and with those of another seed, in turn.

    First forward, the others forward and backward, first backward; then the others in the memory of the first. Results
    and gradients are read after all of it. The others' are judged if they have other bits in that memory than in their
    own.
    """

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, among calls with the values of another seed: one forward and backward between this "
            "case's forward and its backward pass, and one in the same memory after it, which gives what it gave in "
            "memory of its own. Results and gradients are read after the last call: none of them lies in memory that "
            f"another call writes into. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(3 * inner.inputs, 3 * inner.outputs)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return super().inputs(p) | {f"{THEN}/{name}": array for name, array in super().inputs(_other(p)).items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        then = part(tensors, THEN)
        memory = {name: tensors[name].clone() for name in then}
        others: dict[str, torch.Tensor] = {}

        def run_others() -> None:
            others.update(observed(self.inner.run(ops, then, _other(p))))

        with before_backward(run_others):
            first = observed(self.inner.run(ops, memory, p))
        if not others:  # there is no backward pass
            run_others()
        first = _apart(first, memory)
        for name, tensor in memory.items():
            tensor.copy_(then[name])
        again = observed(self.inner.run(ops, memory, _other(p)))
        if again.keys() == others.keys() and all(same_bits(tensor, others[name]) for name, tensor in again.items()):
            return first
        return first | {f"{AGAIN}/{name}": tensor for name, tensor in again.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        then, again = part(inputs, THEN), part(outputs, AGAIN)
        first = {name: array for name, array in outputs.items() if not name.startswith(f"{AGAIN}/")}
        judged = super().judge({name: inputs[name] for name in then}, first, p, contract)
        if not again:
            return judged
        return joined({
            "first": judged,
            "other values in the same memory": super().judge(then, again, _other(p), contract),
        })  # fmt: skip


def _other(p: Params) -> Params:
    return replace(p, seed=p.seed ^ 1)


def _apart(results: dict[str, torch.Tensor], memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the results that lie in the memory of the arguments, as they may: the caller is about to write into it."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in memory.values() if tensor.numel()}
    return {
        name: tensor.clone() if has_elements(tensor) and tensor.untyped_storage().data_ptr() in taken else tensor
        for name, tensor in results.items()
    }
