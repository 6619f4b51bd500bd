# SPDX-License-Identifier: Apache-2.0
"""Another case whose results are read after a second call: those that lie in a buffer of the operator's are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases.base import part
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

THEN = "then"


class KeptResults(Wrapped):
    """The case `inner`, for one preset; before its results are read it runs again, with what another seed gives."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, whose results and gradients are read after the same was run with other inputs: "
            f"none of them lies in memory that the next call writes into. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(2 * inner.inputs, 2 * inner.outputs)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        other = Params(p.preset, p.dtype, p.scale, p.seed ^ 1)
        return super().inputs(p) | {f"{THEN}/{name}": array for name, array in super().inputs(other).items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        then = part(tensors, THEN)
        first = super().run(ops, {name: tensors[name] for name in then}, p)
        super().run(ops, then, p)
        return first

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return super().judge({name: inputs[name] for name in part(inputs, THEN)}, outputs, p, contract)
