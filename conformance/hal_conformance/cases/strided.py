# SPDX-License-Identifier: Apache-2.0
"""Another case, on tensors whose storage is transposed: code that reads it in the order of memory is wrong here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.case import Arrays, Case, Footprint, Params
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Strided:
    """The case `inner`, for one preset, with every matrix (inputs and upstream gradients) stored by columns."""

    name: str
    inner: Case

    @property
    def family(self) -> str:
        """See `Case.family`."""
        return self.inner.family

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Case.needs`."""
        return self.inner.needs

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return f"As {self.inner.name}, with every matrix stored by columns. {self.inner.what}"

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return self.inner.presets()[:1]

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return self.inner.dtypes()

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = self.inner.footprint(p)
        return Footprint(2 * inner.inputs, inner.outputs)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return self.inner.inputs(p)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        by_columns = {
            name: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for name, tensor in tensors.items()
        }
        return self.inner.run(ops, by_columns, p)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return self.inner.judge(inputs, outputs, p, contract)
