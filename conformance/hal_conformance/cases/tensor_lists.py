# SPDX-License-Identifier: Apache-2.0
"""Another case of optimisers or gradients, on other lists: many tensors, tensors of several dtypes, or none at all.

Multi-tensor kernels take their tensors in launches of up to 110, 64, 48, 36 or 30 (by the number of lists), and each of
them in chunks of 65,536 elements: what lies beyond is another launch's, or another block's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal.moe.optimizer_ops import AdamHyper, SGDHyper
from hal_conformance.case import Arrays, Footprint, Malformed, Params
from hal_conformance.cases import parameters
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

    Tensors = Sequence[torch.Tensor]

EMPTY_AT = 7
"""Where the list has a tensor of no elements, as a rank has that holds nothing of a parameter."""


class ManyTensors(Wrapped):
    """The case `inner` on larger parameters, all but the largest cut into rows, each a tensor of its own."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, in more than 110 tensors: one has more than 65,536 elements, one has none, the "
            "rest 1 or 12. What a multi-tensor kernel leaves to its next launch or block must not be lost. "
            f"{self.inner.what}"
        )

    def grown(self, p: Params) -> parameters.Grown:
        """Return the instance."""
        return parameters.Grown(p.preset, p.dtype, p.scale, p.seed)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return self.inner.footprint(self.grown(p))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return self.inner.inputs(self.grown(p))

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return self.inner.run(InPieces(ops), tensors, self.grown(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return self.inner.judge(inputs, outputs, self.grown(p), contract)


class MixedTensors(Wrapped):
    """The case `inner` on tensors of several dtypes and numbers of axes; and, of its operator, on lists of none."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with tensors of four axes, of five, and of none, in bfloat16 and float32: "
            "parameters have gradients of their own dtype and of the other, as where Megatron-LM keeps float32 "
            "gradients of bfloat16 parameters, and nothing is rounded to another's dtype. Lists of no tensors come "
            f"back empty, their norm 0. {self.inner.what}"
        )

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: float32 is among them."""
        return ("bfloat16",)

    def mixed(self, p: Params) -> parameters.Mixed:
        """Return the instance."""
        return parameters.Mixed(p.preset, p.dtype, p.scale, p.seed)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return self.inner.footprint(self.mixed(p))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return self.inner.inputs(self.mixed(p))

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        (name,) = self.needs
        of_none(name, getattr(ops, name))
        return self.inner.run(ops, tensors, self.mixed(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return self.inner.judge(inputs, outputs, self.mixed(p), contract)


_OF_NONE: dict[str, tuple[Any, ...]] = {
    "adamw_step": ([], [], [], [], 1, AdamHyper(0.125)),
    "adam_step": ([], [], [], [], 1, AdamHyper(0.125)),
    "sgd_step": ([], [], [], 1, SGDHyper(0.125)),
    "clip_grad_norm": ([], 1.0),
    "accumulate_gradients": ([[], []], [3, 4]),
}
"""What each operator is called with where a rank holds no parameter."""


def of_none(name: str, operator: Any) -> None:
    """Call an operator with lists of no tensors.

    Raises:
        Malformed: something else came back than as many such lists, and the norm 0.
    """
    made = operator(*_OF_NONE[name])
    lists = [made] if name == "accumulate_gradients" else list(made)
    if name == "clip_grad_norm":
        norm = lists.pop()
        if norm.shape != () or norm.item() != 0.0:
            raise Malformed(f"{name} of no tensors: the norm is {norm}")
    if any(len(some) for some in lists):
        raise Malformed(f"{name} of no tensors: {made} came back")


class InPieces:
    """Operators that are given every list of tensors cut into more, and whose results are put together again."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def adamw_step(self, *given: Any) -> list[Tensors]:
        """See `OptimizerOps.adamw_step`."""
        return self._step(self.ops.adamw_step, *given)

    def adam_step(self, *given: Any) -> list[Tensors]:
        """See `OptimizerOps.adam_step`."""
        return self._step(self.ops.adam_step, *given)

    def sgd_step(self, *given: Any) -> list[Tensors]:
        """See `OptimizerOps.sgd_step`."""
        return self._step(self.ops.sgd_step, *given)

    def clip_grad_norm(self, gradients: Tensors, max_norm: float) -> tuple[Tensors, torch.Tensor]:
        """See `OptimizerOps.clip_grad_norm`."""
        clipped, norm = self.ops.clip_grad_norm(cut(gradients), max_norm)
        return joined(clipped, gradients), norm

    def accumulate_gradients(self, parts: Sequence[Tensors], tokens: Sequence[int]) -> Tensors:
        """See `OptimizerOps.accumulate_gradients`."""
        return joined(self.ops.accumulate_gradients([cut(part) for part in parts], tokens), parts[0])

    def _step(self, take: Any, *given: Any) -> list[Tensors]:
        *lists, step, hyper = given
        return [joined(made, lists[0]) for made in take(*map(cut, lists), step, hyper)]


def cut(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return each tensor's rows, or itself if it fills a chunk, and one of no elements among them."""
    found = []
    for tensor in tensors:
        whole = parameters.pieces(tuple(tensor.shape)) == 1
        found += [tensor] if whole else [row.clone() for row in tensor.split(1)]
    return [*found[:EMPTY_AT], found[0].new_empty(0), *found[EMPTY_AT:]]


def joined(made: Sequence[torch.Tensor], given: Tensors) -> Tensors:
    """Return tensors of the shapes of those that were cut.

    Raises:
        Malformed: they are not as many, or of other shapes.
    """
    import torch

    shapes = [tuple(piece.shape) for piece in cut(given)]
    if [tuple(piece.shape) for piece in made] != shapes:
        raise Malformed(f"{len(made)} tensors came back for {len(shapes)}, or of other shapes")
    rest = [*made[:EMPTY_AT], *made[EMPTY_AT + 1 :]]
    found = []
    for tensor in given:
        count = parameters.pieces(tuple(tensor.shape))
        found.append(rest[0] if count == 1 else torch.cat(rest[:count]))
        rest = rest[count:]
    return found
