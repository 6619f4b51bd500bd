# SPDX-License-Identifier: Apache-2.0
"""The experts: grouped SwiGLU, on exact designs and on data as it occurs, forward and backward.

Each exact design is blind to something, so all are run (research in the documentation): small integers show lost and
swapped rows and the rounding of the output; cancelling integers show accumulators of too few bits; one-hot rows
show every
bit of every weight, and inputs cut to TF32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.bounds import Bounded, half_ulp
from hal_conformance.budget import level
from hal_conformance.case import F64, Array, Arrays, Params
from hal_conformance.cases.base import ByCounts, arithmetic, shape, wide
from hal_conformance.detectors import Finding, exact, judge, merge, structure
from hal_conformance.oracle import ExpertGradients, experts, experts_backward, spans
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch

ONE = 32.0
"""A gate value whose sigmoid is 1 in float32 (1 - 1.3e-14), so that silu(32) is exactly 32."""

WEIGHTS = ("w1_EFD", "w3_EFD", "w2_EDF")


def chained(value: F64, var: F64, dtype: str) -> Bounded:
    """Bound a stored result by lambda deviations of its chain, plus half an ulp of storage."""
    deviations = level(value.size).deviations * np.sqrt(var)
    return Bounded(value, deviations + half_ulp(np.abs(value) + deviations, dtype), var)


class ExpertsCase(ByCounts):
    """One call of the experts."""

    def counts(self, p: Params) -> Array:
        """Return rows per expert: many residues, an empty expert, one with a single row."""
        spec, s = preset(p.preset).router, shape(p)
        return make.sweep_counts(p.seed, "experts/counts", spec.num_experts, s.tokens * spec.top_k)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        from hal.moe.ops import ExpertWeights

        weights = ExpertWeights(*(tensors[name] for name in WEIGHTS))
        return {"y_RD": ops.experts(tensors["x_RD"], tensors["counts_E"], weights)}

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shape and dtype."""
        return structure(outputs, {"y_RD": (inputs["x_RD"].shape, p.dtype)})


class ExactExperts(ExpertsCase):
    """A design whose result is exact in every order of summation."""

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: silu is the identity for the gates used here, so integers go in and come out."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        x, counts = wide(inputs["x_RD"]), inputs["counts_E"]
        w1, w3, w2 = (wide(inputs[name]) for name in WEIGHTS)
        want = np.zeros_like(x)
        for e, rows in spans(counts):
            gate = x[rows] @ w1[e].T
            want[rows] = (np.where(gate > 0, gate, 0.0) * (x[rows] @ w3[e].T)) @ w2[e].T
        finding = exact("y", outputs["y_RD"], make.store(want, p.dtype))
        if finding.status is Status.EXACT:
            return merge([finding])
        bad = np.flatnonzero((wide(outputs["y_RD"]) != wide(make.store(want, p.dtype))).any(1))
        owner = np.repeat(np.arange(len(counts)), counts)[bad]
        names = ", ".join(f"expert {e} ({counts[e]} rows)" for e in dict.fromkeys(int(e) for e in owner[:50]))
        return merge([Finding(finding.status, exact=finding.exact, detail=f"{finding.detail}; {names[:120]}")])


def sparse(seed: int, stream: str, ones: int, values: int, *dims: int) -> F64:
    """Return integers in [-values, values] with at most `ones` nonzero in each row of the last axis."""
    width = dims[-1]
    keep = np.argsort(make.words(seed, f"{stream}/keep", *dims), axis=-1, kind="stable") < min(ones, width)
    return np.where(keep, make.integers(seed, stream, -values, values, *dims), 0).astype(np.float64)


def full_bits(seed: int, stream: str, *dims: int) -> F64:
    """Return weights that use all 24 bits of float32; a sum of four bytes alone would end in zeros."""
    return make.weights(seed, stream, *dims) * (1.0 + make.words(seed, f"{stream}/low", *dims) * 2.0**-34)


class Integers(ExactExperts):
    """Small integers; the output needs rounding in the 16-bit dtypes."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        x holds 1 in a channel that alone feeds the gate, 32 of it, and integers up to 3 elsewhere. u sums at most 28
        products of up to 9, at most 252: exact in bfloat16. h = 32 u. y sums four of those times at most 2: at
        most 64,512,
        below float16's largest, in multiples of 32, so every partial sum is exact in float32.
        """
        spec, s = preset(p.preset).router, shape(p)
        counts = self.counts(p)
        rows, experts_ = int(counts.sum()), spec.num_experts
        channel = int(make.permutation(p.seed, "integers/channel", s.width)[0])
        x = make.integers(p.seed, "integers/x", -3, 3, rows, s.width).astype(np.float64)
        x[:, channel] = 1.0
        w1 = np.zeros((experts_, s.hidden, s.width))
        w1[:, :, channel] = ONE
        w3 = sparse(p.seed, "integers/w3", 28, 3, experts_, s.hidden, s.width)
        w2 = sparse(p.seed, "integers/w2", 4, 2, experts_, s.width, s.hidden)
        return {
            "x_RD": make.store(x, p.dtype), "counts_E": counts, "w1_EFD": make.store(w1, p.dtype),
            "w3_EFD": make.store(w3, p.dtype), "w2_EDF": make.store(w2, p.dtype),
        }  # fmt: skip


class Cancelling(Integers):
    """Integers whose partial sums are large and whose sums are small."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        Channels come in pairs with equal weights: v and d - v, v up to 126 in size, d in -1, 0, 1. A sum over 24
        pairs has
        partial sums of hundreds and a result of at most 24; an accumulator of 8 or 11 bits loses the d's. In the
        second product
        the same is done with pairs of equal hidden units and weights w and 1 - w.
        """
        arrays = super().inputs(p)
        s = shape(p)
        counts = arrays["counts_E"]
        rows, experts_ = int(counts.sum()), len(counts)
        order = make.permutation(p.seed, "cancel/order", s.width)
        channel, pairs = order[0], (s.width - 1) // 2
        left, right = order[1 : 1 + pairs], order[1 + pairs : 1 + 2 * pairs]
        v = make.integers(p.seed, "cancel/v", -126, 126, rows, pairs)
        x = np.zeros((rows, s.width))
        x[:, left], x[:, right] = v, make.integers(p.seed, "cancel/d", -1, 1, rows, pairs) - v
        x[:, channel] = 1.0
        half = sparse(p.seed, "cancel/w3", 24, 1, experts_, s.hidden, pairs)
        w3 = np.zeros((experts_, s.hidden, s.width))
        w3[:, :, left] = w3[:, :, right] = half
        units = make.permutation(p.seed, "cancel/units", s.hidden)
        a, b = units[: s.hidden // 2], units[s.hidden // 2 : 2 * (s.hidden // 2)]
        w1 = np.zeros_like(w3)
        w1[:, :, channel] = ONE
        w3[:, b] = w3[:, a]  # equal hidden units in pairs
        w2 = np.zeros((experts_, s.width, s.hidden))
        big = sparse(p.seed, "cancel/w2", 8, 60, experts_, s.width, len(a))
        w2[:, :, a], w2[:, :, b] = big, (big != 0) - big
        arrays.update(
            x_RD=make.store(x, p.dtype), w1_EFD=make.store(w1, p.dtype),
            w3_EFD=make.store(w3, p.dtype), w2_EDF=make.store(w2, p.dtype),
        )  # fmt: skip
        return arrays


class OneHot(ExactExperts):
    """Rows that pick single weights, so that the output is the weights themselves, bit by bit."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        Row r of an expert is 1 in one channel j(r) of its own and in the channel c that all rows share. Each expert
        shows one of its matrices; f(d) is a hidden unit that the seed picks for output channel d:
          - up: the gate is 32 through c, so y[d] = 32 w3[f(d), j].
          - gate: u is 1 through c and w2 picks f(d), so y[d] = w1[f(d), j], from 32 to 64, where silu is the
            identity. In the 16-bit dtypes odd units add 32 through c, which needs rounding: a gate whose store
            truncates is seen. (In float32 the sum itself would round, which a contract may do in its own way.)
          - down: w1 opens the unit j mod F alone and u is 1/32, so h is one-hot and y[d] = w2[d, j mod F].
        Every bit that is read shows, and so does an input cut to fewer bits.
        """
        spec, s = preset(p.preset).router, shape(p)
        counts = self.counts(p)
        rows, experts_ = int(counts.sum()), spec.num_experts
        channel = int(make.permutation(p.seed, "onehot/channel", s.width)[0])
        others = np.delete(np.arange(s.width), channel)
        x = np.zeros((rows, s.width))
        x[np.arange(rows), others[np.arange(rows) % len(others)]] = 1.0
        x[:, channel] = 1.0
        up, gate, down = (np.arange(first, experts_, 3) for first in range(3))
        w1 = np.zeros((experts_, s.hidden, s.width))
        w3 = np.zeros_like(w1)
        w2 = np.zeros((experts_, s.width, s.hidden))
        w2[:, np.arange(s.width), make.integers(p.seed, "onehot/pick", 0, s.hidden - 1, s.width)] = 1.0

        w1[up, :, channel] = ONE
        w3[up] = full_bits(p.seed, "onehot/w3", len(up), s.hidden, s.width)
        w3[up, :, channel] = 0.0

        fraction = make.words(p.seed, "onehot/w1", len(gate), s.hidden, s.width) * 2.0**-32
        w1[gate] = ONE * (1.0 + fraction)
        w1[gate, :, channel] = 0.0
        if p.dtype != "float32":
            w1[gate, 1::2, channel] = ONE
        w3[gate, :, channel] = 1.0

        unit = np.arange(s.width) % s.hidden
        for e in down:
            w1[e, unit[others], others] = ONE
        w3[down, :, channel] = 1.0 / ONE
        w2[down] = full_bits(p.seed, "onehot/w2", len(down), s.width, s.hidden)
        return {
            "x_RD": make.store(x, p.dtype), "counts_E": counts, "w1_EFD": make.store(w1, p.dtype),
            "w3_EFD": make.store(w3, p.dtype), "w2_EDF": make.store(w2, p.dtype),
        }  # fmt: skip

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: a contract that reduces the inputs is judged by its bound, not bit by bit."""
        if arithmetic(contract, p.dtype).input_bits is None:
            return super().judge(inputs, outputs, p, contract)
        return RANDOM.judge(inputs, outputs, p, contract)


class Random(ExpertsCase):
    """Activations with heavy tails and outlier channels."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: activations are scaled to unit variance, as after a norm."""
        spec, s = preset(p.preset).router, shape(p)
        counts = self.counts(p)
        rows = int(counts.sum())
        x = make.activations(p.seed, "experts/x", rows, s.width) * (np.sqrt(s.width) / make.typical_norm(s.width))
        dims = {"w1_EFD": (s.hidden, s.width), "w3_EFD": (s.hidden, s.width), "w2_EDF": (s.width, s.hidden)}
        arrays = {"x_RD": make.store(x, p.dtype), "counts_E": counts}
        for name, sizes in dims.items():
            arrays[name] = make.store(make.weights(p.seed, f"experts/{name}", spec.num_experts, *sizes), p.dtype)
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        w1, w3, w2 = (wide(inputs[name]) for name in WEIGHTS)
        y, var = experts(wide(inputs["x_RD"]), inputs["counts_E"], w1, w3, w2, p.dtype, arithmetic(contract, p.dtype))
        return merge([judge("y", outputs["y_RD"], chained(y, var, p.dtype), independent=len(y))])


class Backward(Random):
    """Gradients of inputs and weights."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        arrays["dy_RD"] = make.store(make.normal(p.seed, "experts/dy", *arrays["x_RD"].shape), p.dtype)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        from hal.moe.ops import ExpertWeights

        leaves = {name: tensors[name].clone().requires_grad_() for name in ("x_RD", *WEIGHTS)}
        weights = ExpertWeights(*(leaves[name] for name in WEIGHTS))
        ops.experts(leaves["x_RD"], tensors["counts_E"], weights).backward(tensors["dy_RD"])
        return {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        names = ("x_RD", *WEIGHTS)
        wrong = structure(outputs, {f"d{name}": (inputs[name].shape, p.dtype) for name in names})
        if wrong is not None:
            return wrong
        w1, w3, w2 = (wide(inputs[name]) for name in WEIGHTS)
        counts = inputs["counts_E"]
        g: ExpertGradients = experts_backward(
            wide(inputs["x_RD"]), counts, w1, w3, w2, wide(inputs["dy_RD"]), p.dtype, arithmetic(contract, p.dtype)
        )
        pairs = {
            "dx_RD": (g.dx, g.var_dx), "dw1_EFD": (g.dw1, g.var_dw1),
            "dw3_EFD": (g.dw3, g.var_dw3), "dw2_EDF": (g.dw2, g.var_dw2),
        }  # fmt: skip
        empty = counts == 0
        # Independent errors: one for each row, and one for each expert that has rows.
        blocks = {name: len(g.dx) if name == "dx_RD" else int((~empty).sum()) for name in pairs}
        found = [
            judge(name, outputs[name], chained(value, var, p.dtype), independent=blocks[name])
            for name, (value, var) in pairs.items()
        ]
        for name in (f"d{w}" for w in WEIGHTS):
            found.append(
                exact(f"{name} of experts without rows", outputs[name][empty], np.zeros_like(pairs[name][0][empty]))
            )
            if found[-1].status is Status.EXACT:
                found.pop()
        return merge(found)


INTEGERS = Integers(
    "experts.integers", "experts", ("experts",),
    "Integers whose every partial sum is exact in float32; the gate's channel makes silu the identity. Lost, "
    "doubled or swapped "
    "rows, low accumulators and truncated stores show, bit by bit.",
)  # fmt: skip
CANCELLING = Cancelling(
    "experts.cancelling", "experts", ("experts",),
    "Integers with partial sums of hundreds and small results, in both products: an accumulator of 8 or 11 bits "
    "is wrong, "
    "bit by bit.",
)  # fmt: skip
ONE_HOT = OneHot(
    "experts.one_hot", "experts", ("experts",),
    "One-hot rows: the output is one weight of the gate, up or down projection, every bit of it. Weights of the wrong "
    "expert, flipped bits, inputs cut to TF32 and truncated stores of the gate show.",
)  # fmt: skip
RANDOM = Random(
    "experts.random", "experts", ("experts",),
    "Heavy tails and outlier channels. Bound: lambda deviations of the chain g, u, silu, h, y, each of which may "
    "be stored in "
    "the dtype, plus half an ulp (oracle.experts). RMS with one independent error a row.",
)  # fmt: skip
BACKWARD = Backward(
    "experts.backward", "experts", ("experts",),
    "Gradients of inputs and of the three weights, chained in the same way (oracle.experts_backward); exactly "
    "zero for an "
    "expert without rows (MSLK PR#158, pytorch PR#174314).",
)  # fmt: skip
CASES = (INTEGERS, CANCELLING, ONE_HOT, RANDOM, BACKWARD)
