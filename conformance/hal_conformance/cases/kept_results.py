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
from hal_conformance.cases.base import before_backward, observed, part, same_results
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

OWN = "own"
RUN = "run"


class KeptResults(Wrapped):
    """The case `inner`, for one preset, run with the inputs of another seed among calls with its own.

    Its own; the other seed's forward, its own forward and backward, the other's backward; then its own in the memory of
    the other's. The other's results and gradients are judged, which are read after all of it. What is kept by shape is
    wrong for these, since `inner` itself has run before. Its own are judged where the three runs differ in a bit.
    """

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name} with another seed, among calls with this one: one before, one forward and backward "
            "between the other's forward and its backward pass, and one in the same memory after it; all give the "
            "same. Results and gradients are read after the last call: none of them lies in memory that another call "
            f"writes into. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(3 * inner.inputs, 4 * inner.outputs)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return super().inputs(_other(p)) | {f"{OWN}/{name}": array for name, array in super().inputs(p).items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        own = part(tensors, OWN)
        memory = {name: tensors[name].clone() for name in own}
        runs: list[dict[str, torch.Tensor]] = []

        def run_own(given: dict[str, torch.Tensor] = own) -> None:
            runs.append(observed(self.inner.run(ops, given, p)))

        run_own()
        with before_backward(run_own):
            other = _apart(observed(self.inner.run(ops, memory, _other(p))), memory)
        for name, tensor in memory.items():
            tensor.copy_(own[name])
        run_own(memory)
        if all(same_results(once, runs[0]) for once in runs):
            return other
        return other | {f"{RUN} {number}/{name}": t for number, once in enumerate(runs, 1) for name, t in once.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        own = part(inputs, OWN)
        other = {name: array for name, array in outputs.items() if not name.startswith(f"{RUN} ")}
        judged = super().judge({name: inputs[name] for name in own}, other, _other(p), contract)
        if len(other) == len(outputs):
            return judged
        labels = sorted({name.partition("/")[0] for name in outputs if name not in other})
        return joined({
            "other seed": judged,
            **{label: super(KeptResults, self).judge(own, part(outputs, label), p, contract) for label in labels},
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
