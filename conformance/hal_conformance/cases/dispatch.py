# SPDX-License-Identifier: Apache-2.0
"""Dispatch: pure data movement, judged bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import (
    ByCounts,
    backward,
    fields_of,
    keeps_nonfinite,
    leaf,
    mean_load,
    observed,
    shape,
    wide,
)
from hal_conformance.cases.kept_graph import KeptGraph
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.narrow import Int32, SmallIntegers
from hal_conformance.cases.sized import FEW_EXPERTS, Aligned, Long, Many, TokenCounts, Unaligned, Whole, Wide
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.detectors import Finding, discrete, exact, judge, merge, structure
from hal_conformance.oracle.dispatching import combine, gather_rows, sent
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


class DispatchCase(ByCounts):
    """Rows, slots and counts of one dispatch."""

    def router(self, p: Params) -> RouterSpec:
        """Return the router's equations, of which E and K matter."""
        return preset(p.preset).router

    def capacity(self, p: Params) -> int | None:
        """Return the most rows of an expert."""
        return None

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        spec, s = self.router(p), shape(p)
        return {
            "x_TD": make.store(make.activations(p.seed, "dispatch/x", s.tokens, s.width), p.dtype),
            "experts_TK": make.choices(p.seed, "dispatch", s.tokens, spec.num_experts, spec.top_k),
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        spec = self.router(p)
        out = ops.dispatch(tensors["x_TD"], tensors["experts_TK"], spec.num_experts, capacity=self.capacity(p))
        return fields_of(out, "Dispatch")

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        return wrong or merge(self.findings(inputs, outputs, p))

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shapes and dtypes."""
        return structure(outputs, self.shapes(inputs, p))

    def shapes(self, inputs: Arrays, p: Params) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the shape and the dtype of each output."""
        spec = self.router(p)
        slot_R, _ = sent(inputs["experts_TK"], spec.num_experts, self.capacity(p))
        return {
            "counts_E": ((spec.num_experts,), "int64"),
            "slot_R": ((len(slot_R),), "int64"),
            "x_RD": ((len(slot_R), inputs["x_TD"].shape[1]), p.dtype),
        }

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params) -> list[Finding]:
        """Return what the detectors say."""
        spec = self.router(p)
        slot_R, counts_E = sent(inputs["experts_TK"], spec.num_experts, self.capacity(p))
        return [
            discrete("counts", outputs["counts_E"], counts_E),
            discrete("slots", outputs["slot_R"], slot_R),
            exact("rows", outputs["x_RD"], inputs["x_TD"][slot_R // spec.top_k]),
        ]


class Capacity(DispatchCase):
    """A capacity that the busier experts exceed."""

    def capacity(self, p: Params) -> int | None:
        """See `DispatchCase.capacity`: the mean load, rounded up."""
        return mean_load(p)


class CapacityOne(DispatchCase):
    """One row for each expert."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: few experts drop the most."""
        return FEW_EXPERTS

    def capacity(self, p: Params) -> int | None:
        """See `DispatchCase.capacity`."""
        return 1


class CapacityZero(DispatchCase):
    """A capacity of zero drops every row; it is not the absence of one."""

    def capacity(self, p: Params) -> int | None:
        """See `DispatchCase.capacity`."""
        return 0


class OneExpert(DispatchCase):
    """Every token on one expert first, and the others empty where K leaves them so."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        spec = self.router(p)
        arrays = super().inputs(p)
        last = np.arange(spec.num_experts - spec.top_k, spec.num_experts)
        arrays["experts_TK"] = np.tile(last[::-1], (len(arrays["x_TD"]), 1)).astype(np.int64)
        return arrays


class CapacityAmple(DispatchCase):
    """A capacity beyond the number of tokens, so that nothing can be dropped."""

    def capacity(self, p: Params) -> int | None:
        """See `DispatchCase.capacity`."""
        return 2 * shape(p).tokens


@dataclass(frozen=True)
class Few(DispatchCase):
    """The first tokens alone, or none."""

    tokens: int = 0

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array[: self.tokens] for name, array in super().inputs(p).items()}


class NanRow(DispatchCase):
    """A token of NaN, and one of infinities."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        x = arrays["x_TD"].copy()
        x[1], x[2], x[2, ::2] = np.nan, np.inf, -np.inf
        return {**arrays, "x_TD": x}


class Backward(DispatchCase):
    """Rows where tokens are trained; the gradient of a token is the sum over its rows."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        slot_R, _ = sent(arrays["experts_TK"], self.router(p).num_experts, self.capacity(p))
        dx = make.normal(p.seed, "dispatch/dx", len(slot_R), arrays["x_TD"].shape[1])
        return {**arrays, "dx_RD": make.store(dx, p.dtype)}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        x = leaf(tensors["x_TD"])
        found = self.there_and_back(ops, {**tensors, "x_TD": x}, p)
        return observed({**found, "dx_TD": x.grad})

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `frozen.Trainable`."""
        return ("x_TD",)

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """See `frozen.Trainable`."""
        found = DispatchCase.run(self, ops, dict(tensors), p)
        backward(found["x_RD"], tensors["dx_RD"] if factor == 1.0 else factor * tensors["dx_RD"])
        return found

    def shapes(self, inputs: Arrays, p: Params) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `DispatchCase.shapes`."""
        return {**super().shapes(inputs, p), "dx_TD": (inputs["x_TD"].shape, p.dtype)}

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params) -> list[Finding]:
        """See `DispatchCase.findings`."""
        spec, x = self.router(p), inputs["x_TD"]
        slot_R, _ = sent(inputs["experts_TK"], spec.num_experts, self.capacity(p))
        rows = gather_rows(wide(inputs["dx_RD"]), slot_R, len(x), spec.top_k)
        gradient = judge("dx", outputs["dx_TD"], combine(rows, np.ones(rows.shape[:2]), p.dtype))
        return [*super().findings(inputs, outputs, p), gradient]


class NanBackward(Backward):
    """A row whose gradient is NaN, and an infinite element in another token's."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        dx = arrays["dx_RD"].copy()
        dx[len(dx) // 2] = np.nan
        slot_R, _ = sent(arrays["experts_TK"], self.router(p).num_experts, self.capacity(p))
        owner = slot_R // self.router(p).top_k
        dx[np.flatnonzero(owner != owner[len(dx) // 2])[0], 1] = -np.inf
        return {**arrays, "dx_RD": dx}

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


class CapacityBackward(Backward, Capacity):
    """The same where the capacity drops some rows."""


class OnlyExpert(Backward):
    """One expert, which has all tokens: the rows are the tokens, and so are their gradients."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return FEW_EXPERTS

    def router(self, p: Params) -> RouterSpec:
        """See `DispatchCase.router`."""
        return replace(super().router(p), num_experts=1, top_k=1)


_WHAT = "Rows, slots and counts, bit by bit: sorted by expert, then by slot. "
_SUM = _WHAT + "The gradient of a token: the sum over its rows, in float32. Bound: K u sum |dx| and half an ulp."
_NEEDS = ("dispatch",)
SENT = ("x_RD", "slot_R", "counts_E")
PERMUTATION = DispatchCase(
    "dispatch.permutation", "dispatch", _NEEDS, _WHAT + "One hot, one empty and one single expert."
)  # fmt: skip
BACKWARD = Backward("dispatch.backward", "dispatch", _NEEDS, _SUM)
CAPACITY = Capacity(
    "dispatch.capacity", "dispatch", _NEEDS, _WHAT + "At the mean load as capacity, later slots are dropped."
)  # fmt: skip
CAPACITY_BACKWARD = CapacityBackward(
    "dispatch.capacity_backward", "dispatch", _NEEDS, _SUM + " Rows that were dropped add nothing."
)  # fmt: skip
CASES = (
    PERMUTATION,
    CAPACITY,
    CapacityAmple(
        "dispatch.capacity_ample", "dispatch", _NEEDS, _WHAT + "With a capacity of twice the tokens nothing is dropped."
    ),
    CapacityOne("dispatch.capacity_one", "dispatch", _NEEDS, _WHAT + "With a capacity of one each keeps its first."),
    CapacityZero("dispatch.capacity_zero", "dispatch", _NEEDS, _WHAT + "With a capacity of zero nothing is left."),
    OneExpert("dispatch.one_expert", "dispatch", _NEEDS, _WHAT + "All tokens on the same K experts, the rest empty."),
    Few("dispatch.no_tokens", "dispatch", _NEEDS, _WHAT + "No tokens: empty rows, counts of zero."),
    Few("dispatch.one_token", "dispatch", _NEEDS, _WHAT + "One token, as in decoding: its choices are sorted.", 1),
    Few("dispatch.few_tokens", "dispatch", _NEEDS, _WHAT + "Five tokens, as in decoding for a few.", 5),
    NanRow(
        "dispatch.nan_row", "dispatch", _NEEDS,
        _WHAT + "A token of NaN and one of infinities are copied like any other, and reach no other's rows: a product "
        "with a matrix of zeros and ones spreads them.",
    ),
    BACKWARD,
    CAPACITY_BACKWARD,
    NanBackward(
        "dispatch.nan_backward", "dispatch", _NEEDS,
        _SUM + " A row of NaN reaches its own token only, an infinity its own element: kept, for loss scaling to see, "
        "and not made the largest finite number.",
    ),
    OnlyExpert("dispatch.only_expert", "dispatch", _NEEDS, "E = 1 and K = 1. " + _SUM),
    Strided("dispatch.strided", PERMUTATION), Sliced("dispatch.sliced", BACKWARD, only=FEW_EXPERTS),
    TokenCounts("dispatch.token_counts", BACKWARD, only=FEW_EXPERTS),
    Aligned("dispatch.aligned", PERMUTATION),
    Aligned("dispatch.aligned_backward", BACKWARD),
    Long("dispatch.long", PERMUTATION, only=FEW_EXPERTS),
    Many("dispatch.many", BACKWARD, only=FEW_EXPERTS),
    Long("dispatch.long_backward", BACKWARD, only=FEW_EXPERTS),
    Long("dispatch.long_capacity", CAPACITY, only=FEW_EXPERTS),
    Long("dispatch.long_capacity_backward", CAPACITY_BACKWARD, only=FEW_EXPERTS),
    Int32("dispatch.int32", PERMUTATION, only=FEW_EXPERTS),
    SmallIntegers("dispatch.small_integers", PERMUTATION, only=FEW_EXPERTS),
    Unaligned("dispatch.unaligned", PERMUTATION, only=FEW_EXPERTS),
    Unaligned("dispatch.unaligned_backward", BACKWARD, only=FEW_EXPERTS),
    Wide("dispatch.wide", PERMUTATION, only=FEW_EXPERTS),
    Wide("dispatch.wide_backward", BACKWARD, only=FEW_EXPERTS),
    Whole("dispatch.whole", BACKWARD, only=FEW_EXPERTS),
    Tails("dispatch.tails", PERMUTATION, only=FEW_EXPERTS),
    Tails("dispatch.tails_backward", BACKWARD, only=FEW_EXPERTS),
    KeptResults("dispatch.kept", PERMUTATION, only=FEW_EXPERTS),
    KeptResults("dispatch.kept_backward", BACKWARD, only=FEW_EXPERTS),
    KeptGraph("dispatch.kept_graph", BACKWARD, only=FEW_EXPERTS),
    Untrained("dispatch.untrained", PERMUTATION, SENT, only=FEW_EXPERTS),
    Untrained("dispatch.capacity_untrained", CAPACITY, SENT, modes=IN_SERVICE, only=FEW_EXPERTS),
    Shifted("dispatch.shifted", BACKWARD, only=FEW_EXPERTS),
)  # fmt: skip
