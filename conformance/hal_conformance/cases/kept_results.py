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
from hal_conformance.cases.base import PassBack, before_backward, observed, part, same_leaves, same_results
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

OWN = "own"
RUN = "run"
IN_FLIGHT = 2
"""Calls between another's forward and its backward pass: what is kept in two buffers in turn is lost then, too, and
results in three."""


class KeptResults(Wrapped):
    """The case `inner`, for one preset, run with the inputs of another seed among calls with its own.

    Its own; the forward passes of the other seed and of two of its own, as micro-batches in flight, then a backward
    pass of its own, the other's, and one of its own: neither the last comes first, nor the first, as in a pipeline.
    Then its own in the other's tensors, the same objects with other values, as weights are after an optimizer's step in
    place. The other's results and gradients are judged, which are read after all of
    it: what was kept in the first call for a shape is wrong for these. Its own are judged where two runs differ in a
    bit.
    """

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: what is kept for one of the two of 16 bits is kept for the other."""
        return tuple(dtype for dtype in super().dtypes() if dtype != "float16")

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name} with another seed, among calls with this one: one before, two whose forward passes "
            "lie between the other's forward and its backward pass, which lies between theirs, and one in the same "
            "tensors after it; all give the same. Results and gradients are read after the last call: none of them "
            f"lies in memory that another call writes into. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(3 * inner.inputs, (3 + IN_FLIGHT) * inner.outputs)

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

        def in_flight(pass_back: PassBack) -> None:
            def between(_: PassBack) -> None:
                run_own()
                pass_back()

            with before_backward(between):
                run_own()

        run_own()
        with same_leaves(memory.values()):
            with before_backward(in_flight):
                other = _apart(observed(self.inner.run(ops, memory, _other(p))), memory)
            while len(runs) < 1 + IN_FLIGHT:  # one that has no backward pass
                run_own()
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
