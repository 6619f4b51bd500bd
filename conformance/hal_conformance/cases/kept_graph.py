# SPDX-License-Identifier: Apache-2.0
"""Another case whose graph is kept and run backward again: what the first pass frees or counts is missed then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.errors import UnsupportedOperation
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import graphs_kept, leaf, observed, part
from hal_conformance.cases.frozen import Trainable
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.detectors import exact, joined, merge, structure
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

ZERO = "of zeros"


class Once:
    """The operators, each run once: a second call returns the results of the first, and so their graph."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if name not in self._made:
                self._made[name] = getattr(self._ops, name)(*given, **named)
            return self._made[name]

        return call


@contextmanager
def refusal_of_compiled_code() -> Iterator[None]:
    """Turn the refusal of what torch.compile made into one that is no verdict; only by its words can it be told.

    Raises:
        UnsupportedOperation: a graph of compiled code cannot be kept.
    """
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        message = "what torch.compile made keeps no graph (torch._functorch.config.donated_buffer)"
        raise UnsupportedOperation(message, device="torch.compile", what="retain_graph") from error


@dataclass(frozen=True)
class KeptGraph(Wrapped):
    """The case `inner`, for one preset, its graph run backward three times: as ever, negative, and with zeros.

    The second pass gives minus the gradients of the first, bit by bit where they are exact; their signs are turned
    back before they are judged.
    """

    inner: Trainable

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, on a graph that is kept (retain_graph=True): the gradients are those of a second "
            "backward pass, with minus the upstream gradients; a third one, with zeros, gives zeros. (What "
            f"torch.compile made may refuse, since it frees memory early: UNSUPPORTED.) {self.inner.what}"
        )

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: of the third pass there is the largest of each gradient, NaN if one is."""
        leaves = {name: leaf(tensors[name]) for name in self.inner.names(tensors)}
        once, given, gradients = Once(ops), {**tensors, **leaves}, {}
        with graphs_kept(), refusal_of_compiled_code():
            for factor in (1.0, -1.0, 0.0):
                found = self.inner.there_and_back(once, given, p, factor)
                gradients[factor] = {name: tensor.grad for name, tensor in leaves.items()}
                for tensor in leaves.values():
                    tensor.grad = None
        second = {f"d{name}": None if grad is None else -grad for name, grad in gradients[-1.0].items()}
        third = {
            f"{ZERO}/d{name}": None if grad is None else grad.abs().amax() for name, grad in gradients[0.0].items()
        }
        return observed({**found, **second, **third})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        third = part(outputs, ZERO)
        zeros = {f"d{name}": np.zeros((), inputs[name].dtype) for name in self.inner.names(inputs)}
        wrong = structure(third, {name: ((), str(zero.dtype)) for name, zero in zeros.items()})
        none = wrong or merge(exact(name, third[name], zero) for name, zero in zeros.items())
        return joined({"second pass": super().judge(inputs, outputs, p, contract), "pass of zeros": none})
