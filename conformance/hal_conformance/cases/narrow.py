# SPDX-License-Identifier: Apache-2.0
"""Another case with indices and counts of fewer bits, which the protocol admits: code that reads 64 is wrong here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases.base import part
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


class Int32(Wrapped):
    """The case `inner`, for one preset, with int32 for every int64 that goes in; what comes back is as ever."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return f"As {self.inner.name}, with indices and counts in int32, which the protocol admits. {self.inner.what}"

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        narrow = {name: t.to(torch.int32) if t.dtype == torch.int64 else t for name, t in tensors.items()}
        return super().run(ops, narrow, p)


class SmallIntegers(Wrapped):
    """The case `inner`, for one preset, once with each of int16, int8 and uint8 for every int64 that fits into it."""

    DTYPES = ("int16", "int8", "uint8")

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with indices in int16, in int8 and in uint8, where these hold them, which the "
            f"protocol admits. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(inner.inputs, len(self.DTYPES) * inner.outputs)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        whole = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.int64}
        found: dict[str, torch.Tensor] = {}
        for name in self.DTYPES:
            dtype: torch.dtype = getattr(torch, name)
            narrow = {n: t.to(dtype) for n, t in whole.items() if _holds(dtype, t)}
            found |= {f"{name}/{n}": t for n, t in super().run(ops, {**tensors, **narrow}, p).items()}
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return joined({name: super(SmallIntegers, self).judge(inputs, part(outputs, name), p, contract)
                       for name in self.DTYPES})  # fmt: skip


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    import torch

    most = torch.iinfo(dtype)
    return most.min <= int(tensor.amin()) and int(tensor.amax()) <= most.max
