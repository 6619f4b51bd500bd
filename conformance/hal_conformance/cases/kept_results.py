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
OTHERS = "others"


class KeptResults(Wrapped):
    """The case `inner`, for one preset, run with its own inputs and with those of another seed, in turn.

    The others; this case's forward, the others forward and backward, this case's backward; then the others in the
    memory of this case's inputs. Results and gradients are read after all of it. The others' are judged if their three
    runs differ in a bit.
    """

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, among calls with the values of another seed: one before, one forward and backward "
            "between this case's forward and its backward pass, and one in the same memory after it; all give the "
            "same. Results and gradients are read after the last call: none of them lies in memory that another call "
            f"writes into. {self.inner.what}"
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
        others: list[dict[str, torch.Tensor]] = []

        def run_others(given: dict[str, torch.Tensor] = then) -> None:
            others.append(observed(self.inner.run(ops, given, _other(p))))

        run_others()
        with before_backward(run_others):
            first = _apart(observed(self.inner.run(ops, memory, p)), memory)
        for name, tensor in memory.items():
            tensor.copy_(then[name])
        run_others(memory)
        if all(_same(once, others[0]) for once in others):
            return first
        again = {f"{OTHERS} {number}/{name}": t for number, once in enumerate(others, 1) for name, t in once.items()}
        return first | again

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        then = part(inputs, THEN)
        first = {name: array for name, array in outputs.items() if not name.startswith(f"{OTHERS} ")}
        judged = {"": super().judge({name: inputs[name] for name in then}, first, p, contract)}
        for label in sorted({name.partition("/")[0] for name in outputs if name not in first}):
            judged[label] = super().judge(then, part(outputs, label), _other(p), contract)
        return joined({label or "its own": one for label, one in judged.items()}) if len(judged) > 1 else judged[""]


def _other(p: Params) -> Params:
    return replace(p, seed=p.seed ^ 1)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


def _apart(results: dict[str, torch.Tensor], memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the results that lie in the memory of the arguments, as they may: the caller is about to write into it."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in memory.values() if tensor.numel()}
    return {
        name: tensor.clone() if has_elements(tensor) and tensor.untyped_storage().data_ptr() in taken else tensor
        for name, tensor in results.items()
    }
