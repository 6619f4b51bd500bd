# SPDX-License-Identifier: Apache-2.0
"""A case around another one: everything is the inner case's unless a subclass says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.case import SCALES, Arrays, Case, Footprint, Params, Scale
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Wrapped:
    """The case `inner` under another name, for the first of its presets.

    Attributes:
        only: other presets; empty: the inner case's first.
    """

    name: str
    inner: Case
    only: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def family(self) -> str:
        """See `Case.family`."""
        return self.inner.family

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Case.needs`."""
        return self.inner.needs

    @property
    def multiplies(self) -> bool:
        """See `Case.multiplies`."""
        return self.inner.multiplies

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return self.inner.what

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return self.only or self.inner.presets()[:1]

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return self.inner.dtypes()

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`: those of any preset of the inner case."""
        return tuple(scale for scale in SCALES if any(scale in self.inner.scales(own) for own in self.inner.presets()))

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return self.inner.footprint(p)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return self.inner.inputs(p)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return self.inner.run(ops, tensors, p)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return self.inner.judge(inputs, outputs, p, contract)
