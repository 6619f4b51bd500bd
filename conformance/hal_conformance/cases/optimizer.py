# SPDX-License-Identifier: Apache-2.0
"""AdamW, Adam and SGD: ten steps, each judged from the device's own state before it; and all ten at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.optimizer_ops import AdamHyper, SGDHyper
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Footprint, Params
from hal_conformance.cases import parameters
from hal_conformance.cases.base import keeps_nonfinite, observed
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.parameters import nonfinite
from hal_conformance.cases.strided import Strided
from hal_conformance.cases.tensor_lists import ManyTensors, MixedTensors
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import ExactMeter, Finding, judge, merge, structure
from hal_conformance.oracle import adam, sgd
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

STEPS = 10


class OptimizerCase(parameters.ParameterCase):
    """Steps of an optimiser."""

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        size = 4 * STEPS * parameters.elements(p)
        return Footprint(size, 3 * size)


def initial(p: Params, steps: int = STEPS) -> Arrays:
    """Return parameters and as many gradients of each."""
    each = [parameters.gradients(p, f"optimizer/g{step}") for step in range(1, steps + 1)]
    stacked = {name: np.stack([g[name] for g in each]) for name in each[0]}
    return {
        **parameters.stored("p", parameters.values(p, "optimizer/p"), parameters.dtypes(p, "p")),
        **parameters.stored("g", stacked, parameters.dtypes(p, "g")),
    }


def best(candidates: Iterable[list[Finding]]) -> list[Finding]:
    """Return the findings under the first admitted reading that is green, or else under that which fits best."""

    def distance(findings: list[Finding]) -> tuple[int, float]:
        return max(f.status.severity for f in findings), max((f.margin or 0.0) for f in findings)

    found = []
    for findings in candidates:  # lazily: most devices fit the first
        if all(f.status.colour == "green" for f in findings):
            return findings
        found.append(findings)
    return min(found, key=distance)


def by_dtype(of: Callable[[str], Bounded], p: Params) -> Bounded:
    """Return [steps, elements] that are stored, each parameter's in its dtype.

    Args:
        of: returns everything as one dtype stores it.
        p: the instance.
    """
    dtypes = parameters.dtypes(p, "p")
    made = {dtype: of(dtype) for dtype in dict.fromkeys(dtypes.values())}
    columns = [(made[dtypes[name]], at) for name, at in parameters.columns(p).items()]
    return Bounded(
        *(np.concatenate([getattr(b, part)[:, at] for b, at in columns], axis=1) for part in ("value", "bound", "var"))
    )


def by_parameter(what: str, expected: Bounded, outputs: Arrays, inputs: Arrays, kind: str, p: Params) -> list[Finding]:
    """Judge [steps, elements], one finding for each parameter; a row is a step, the first being 0.

    At the first step the only thing that an error of a parameter may depend on is its own value (Adam's first step is
    lr for everyone), and one of a moment the gradient: so many are independent as there are of those.
    """
    found = []
    for name, at in parameters.columns(p).items():
        bounded = Bounded(expected.value[:, at], expected.bound[:, at], expected.var[:, at])
        # In its own dtype, so that what overflows there is known to.
        array = outputs[f"{kind}/{name}"].reshape(bounded.value.shape)
        independent = parameters.distinct(inputs[f"{'p' if kind == 'p' else 'g'}/{name}"])
        found.append(judge(f"{what} of {name}", array, bounded, independent=independent))
    return found


@dataclass(frozen=True)
class Adam(OptimizerCase):
    """Steps of AdamW or Adam.

    Attributes:
        hyper: what is judged.
        before: steps that the given state has behind it.
        steps: how many are taken.
        schedule: hyperparameters of each step, in place of one `hyper` for all.
    """

    hyper: AdamHyper
    before: int = 0
    steps: int = STEPS
    schedule: tuple[AdamHyper, ...] = ()

    @property
    def decoupled(self) -> bool:
        """Whether the decay is taken from the parameter."""
        return self.needs == ("adamw_step",)

    @property
    def hypers(self) -> tuple[AdamHyper, ...]:
        """Hyperparameters of each step."""
        return self.schedule or (self.hyper,) * self.steps

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: with a state, if there are steps behind it."""
        arrays = initial(p, self.steps)
        if self.before:
            first, second = parameters.gradients(p, "optimizer/m"), parameters.gradients(p, "optimizer/v")
            arrays |= parameters.stored("m", {name: 0.3 * g for name, g in first.items()}, parameters.dtypes(p, "m"))
            arrays |= parameters.stored("v", {name: g**2 for name, g in second.items()}, parameters.dtypes(p, "v"))
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        take = getattr(ops, self.needs[0])
        current = parameters.listed(tensors, "p", p)
        if self.before:
            first, second = (parameters.listed(tensors, kind, p) for kind in "mv")
        else:
            first, second = ([torch.zeros_like(t, dtype=torch.float32) for t in current] for _ in "mv")
        kinds: dict[str, list[list[torch.Tensor]]] = {"p": [], "m": [], "v": []}
        for at, hyper in enumerate(self.hypers):
            gradients = [g[at] for g in parameters.listed(tensors, "g", p)]
            current, first, second = take(current, gradients, first, second, self.before + at + 1, hyper)
            for kind, made in zip("pmv", (current, first, second), strict=True):
                kinds[kind].append([t.clone() for t in made])
        return observed(parameters.returned(kinds, p))

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, parameters.expected_structure("pmv", p, self.steps))
        if wrong is not None:
            return wrong
        start = {kind: parameters.flat(inputs, kind, p) for kind in ("pmv" if self.before else "p")}
        g = parameters.flat(inputs, "g", p, self.steps)
        after = {kind: parameters.flat(outputs, kind, p, self.steps) for kind in "pmv"}
        before = {
            kind: np.concatenate([start.get(kind, np.zeros_like(start["p"])), rows[:-1]])
            for kind, rows in after.items()
        }
        found: list[Finding] = []
        alike = [slice(at, at + 1) for at in range(self.steps)] if self.schedule else [slice(None)]
        for rows in alike:
            was, now = ({kind: steps[rows] for kind, steps in some.items()} for some in (before, after))
            found += self._local(rows, g[rows], was, now, {name: a[rows] for name, a in outputs.items()}, inputs, p)
        return merge([*found, *self._chained(start["p"], g, outputs, inputs, p)])

    def _local(
        self,
        rows: slice,
        g: F64,
        before: Mapping[str, F64],
        after: Mapping[str, F64],
        outputs: Arrays,
        inputs: Arrays,
        p: Params,
    ) -> list[Finding]:
        """Judge steps of the same hyperparameters from the state that the device itself had before each of them."""
        hyper = self.hypers[rows][0]
        decay = 0.0 if self.decoupled else hyper.weight_decay
        was = {kind: Bounded.exact(rows) for kind, rows in before.items()}
        effective = adam.gradient(g, was["p"], decay)
        step = np.arange(self.before + 1.0, self.before + self.steps + 1.0)[rows, None]
        m, v = (adam.unstored(after[kind]) for kind in "mv")

        def moments(kind: str, moment: Callable[..., Bounded], at: int) -> list[Finding]:
            readings = {reading.betas(hyper)[at] for reading in adam.READINGS}
            what = "first moment" if kind == "m" else "second moment"
            return best(
                by_parameter(what, moment(was[kind], effective, beta), outputs, inputs, kind, p)
                for beta in sorted(readings)
            )

        def parameter(single: bool) -> list[Finding]:
            expected = by_dtype(
                lambda dtype: adam.parameter(
                    was["p"], m, v, step, hyper, dtype, decoupled=self.decoupled, single=single
                ),
                p,
            )
            return by_parameter("parameter", expected, outputs, inputs, "p", p)

        return [
            *moments("m", adam.first_moment, 0),
            *moments("v", adam.second_moment, 1),
            *best(parameter(single) for single in (False, True)),
        ]

    def _chained(self, start: F64, g: F64, outputs: Arrays, inputs: Arrays, p: Params) -> list[Finding]:
        """Judge the last step from the inputs alone: in float32, since ten stores in bfloat16 admit everything."""
        if p.dtype != "float32" or self.before or not np.isfinite(g).all():
            return []
        last = {name: array[-1:] for name, array in outputs.items()}

        def under(reading: adam.Reading) -> list[Finding]:
            expected = adam.chained(start[0], g, self.hypers, reading, decoupled=self.decoupled)
            found = []
            for kind, part in zip("pmv", expected, strict=True):
                rows = Bounded(part.value[None], part.bound[None], part.var[None])
                found += by_parameter(f"{kind} after {len(g)} steps", rows, last, inputs, kind, p)
            return found

        return best(under(reading) for reading in adam.READINGS)


@dataclass(frozen=True)
class NonfiniteAdam(Adam):
    """A NaN and an infinity among the gradients."""

    steps: int = 1

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        for name, bad in (("g/dense", np.nan), ("g/expert0", np.inf)):
            arrays[name] = make.with_one(arrays[name], bad, p.seed, f"optimizer/{name}/bad", at=0)
        return arrays

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


@dataclass(frozen=True)
class SGD(OptimizerCase):
    """Steps of SGD with momentum.

    Attributes:
        hyper: what is judged.
        steps: how many are taken.
        schedule: hyperparameters of each step, in place of one `hyper` for all.
    """

    hyper: SGDHyper
    steps: int = STEPS
    schedule: tuple[SGDHyper, ...] = ()

    @property
    def hypers(self) -> tuple[SGDHyper, ...]:
        """Hyperparameters of each step."""
        return self.schedule or (self.hyper,) * self.steps

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return initial(p, self.steps)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        current = parameters.listed(tensors, "p", p)
        momentum = [torch.zeros_like(t, dtype=torch.float32) for t in current]
        kinds: dict[str, list[list[torch.Tensor]]] = {"p": [], "b": []}
        for at, hyper in enumerate(self.hypers):
            gradients = [g[at] for g in parameters.listed(tensors, "g", p)]
            current, momentum = ops.sgd_step(current, gradients, momentum, at + 1, hyper)
            for kind, made in zip("pb", (current, momentum), strict=True):
                kinds[kind].append([t.clone() for t in made])
        return observed(parameters.returned(kinds, p))

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, parameters.expected_structure("pb", p, self.steps))
        if wrong is not None:
            return wrong
        start, g = parameters.flat(inputs, "p", p), parameters.flat(inputs, "g", p, self.steps)
        after = {kind: parameters.flat(outputs, kind, p, self.steps) for kind in "pb"}
        before = {
            "p": np.concatenate([start, after["p"][:-1]]),
            "b": np.concatenate([np.zeros_like(start), after["b"][:-1]]),
        }
        return merge(self.findings(start, g, before, after, outputs, inputs, p))

    def findings(
        self,
        start: F64,
        g: F64,
        before: Mapping[str, F64],
        after: Mapping[str, F64],
        outputs: Arrays,
        inputs: Arrays,
        p: Params,
    ) -> list[Finding]:
        """Judge each step from the state before it, and the last from the inputs alone, in float32."""
        was = {kind: Bounded.exact(rows) for kind, rows in before.items()}
        now, each = adam.unstored(after["b"]), [(at, slice(at, at + 1), hyper) for at, hyper in enumerate(self.hypers)]
        momentum = _steps(
            sgd.momentum(_rows(was["b"], row), g[row], _rows(was["p"], row), at + 1, hyper) for at, row, hyper in each
        )

        def stepped(dtype: str) -> Bounded:
            return _steps(sgd.parameter(_rows(was["p"], row), _rows(now, row), hyper, dtype) for _, row, hyper in each)

        expected = by_dtype(stepped, p)
        found = [
            *by_parameter("momentum", momentum, outputs, inputs, "b", p),
            *by_parameter("parameter", expected, outputs, inputs, "p", p),
        ]
        if p.dtype == "float32":
            last = {name: array[-1:] for name, array in outputs.items()}
            for kind, part in zip("pb", sgd.chained(start[0], g, self.hypers), strict=True):
                rows = Bounded(part.value[None], part.bound[None], part.var[None])
                found += by_parameter(f"{kind} after {self.steps} steps", rows, last, inputs, kind, p)
        return found


def _rows(b: Bounded, at: slice) -> Bounded:
    return Bounded(b.value[at], b.bound[at], b.var[at])


def _steps(rows: Iterable[Bounded]) -> Bounded:
    each = list(rows)
    return Bounded(*(np.concatenate([getattr(b, part) for b in each]) for part in ("value", "bound", "var")))


@dataclass(frozen=True)
class ExactSGD(SGD):
    """Integers, and hyperparameters that are powers of two: float32 rounds nothing."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays: Arrays = {}
        for name, shape in parameters.shapes(p).items():
            # b has 9 bits behind the point after ten steps, lr b 12, and p stays below 2^8: 21 bits in all.
            g = make.integers(p.seed, f"optimizer/exact/{name}", -7, 7, self.steps, *shape).astype(np.float64)
            value = make.integers(p.seed, f"optimizer/exact/p/{name}", -99, 99, *shape).astype(np.float64)
            arrays |= {f"p/{name}": make.store(value, p.dtype), f"g/{name}": make.store(g, p.dtype)}
        return arrays

    def findings(
        self,
        start: F64,
        g: F64,
        before: Mapping[str, F64],
        after: Mapping[str, F64],
        outputs: Arrays,
        inputs: Arrays,
        p: Params,
    ) -> list[Finding]:
        """Compare bit by bit; a parameter in bfloat16 is rounded once a step, which has one result, too."""
        kept = np.full((self.steps, 1), self.hyper.momentum)
        kept[0] = 0.0
        momentum = kept * before["b"] + g
        parameter = make.store(before["p"] - self.hyper.lr * after["b"], p.dtype)
        found = []
        for what, got, expected in (("momentum", after["b"], momentum), ("parameter", after["p"], parameter)):
            for name, at in parameters.columns(p).items():
                meter = ExactMeter(f"{what} of {name}")
                meter.add(got[:, at], np.asarray(expected[:, at], np.float64))
                found.append(meter.finding())
        return found


class NonfiniteSGD(ExactSGD):
    """A NaN among the gradients of an early step, and an infinity among those of the last."""

    BAD = (("g/dense", 2, np.nan), ("g/expert0", STEPS - 1, np.inf))
    """Which gradient, at which step, and what. A later step may take a decay of 0 times an infinite parameter."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        for name, at, bad in self.BAD:
            arrays[name] = make.with_one(arrays[name], bad, p.seed, f"optimizer/{name}/bad", at=at)
        return arrays

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


_LOCAL = (
    " Ten steps, each judged from the device's own state before it, elementwise: parameters from its own new "
    "moments, so that an error of a moment shows there and nowhere else. Gradients that are tiny, zero, or much "
    "larger for experts; one expert has none at all. In float32 the tenth step is judged from the inputs alone, too. "
    "Parameters in bfloat16 have states in float32 and are rounded once. 1 - beta and the bias corrections may be "
    "computed in float32 or wider, and each reading has its own bound (oracle.adam)."
)
ADAMW = Adam(
    "optimizer.adamw", "optimizer", ("adamw_step",),
    "AdamW with decoupled decay, betas 0.9 and 0.95." + _LOCAL,
    AdamHyper(1e-2, 0.9, 0.95, 1e-8, 0.1),
)  # fmt: skip
ADAM = Adam(
    "optimizer.adam", "optimizer", ("adam_step",),
    "Adam with coupled decay: an L2 penalty that passes through the moments; betas 0.95 and 0.999." + _LOCAL,
    AdamHyper(1e-2, 0.95, 0.999, 1e-8, 0.25),
)  # fmt: skip
ROUNDED_SGD = SGD(
    "optimizer.sgd", "optimizer", ("sgd_step",),
    "SGD with momentum 0.9, dampening 0.1 (not at the first step) and coupled decay; bounds of a constant, a "
    "product and a sum for each term (oracle.sgd). Ten steps, each from the device's own state, and in float32 "
    "all ten.",
    SGDHyper(1e-2, 0.9, 0.1, 0.01),
)  # fmt: skip
SCHEDULE = (
    AdamHyper(0.0, 0.9, 0.5, 1e-8, 0.1), AdamHyper(0.5, 0.9, 0.0, 1e-8, 0.1), AdamHyper(2.0**-6, 0.0, 0.95, 1e-8),
)  # fmt: skip
SGD_SCHEDULE = (
    SGDHyper(0.0, 0.9, 0.1, 0.01), SGDHyper(0.5, 0.0, 0.5, 0.25), SGDHyper(2.0**-6, 0.0, 0.0, 0.1), SGDHyper(0.5, 0.5),
)  # fmt: skip
EXACT_SGD = ExactSGD(
    "optimizer.sgd_exact", "optimizer", ("sgd_step",),
    "SGD with momentum on integers, learning rate 1/8 and momentum 1/2: nothing is rounded in float32, and a "
    "parameter in bfloat16 once, so every bit of ten steps is known.",
    SGDHyper(0.125, 0.5),
)  # fmt: skip
CASES = (
    ADAMW,
    Adam(
        "optimizer.adamw_no_decay", "optimizer", ("adamw_step",),
        "AdamW without decay, betas 0.8 and 0.999, epsilon 1e-5." + _LOCAL,
        AdamHyper(2.0**-6, 0.8, 0.999, 1e-5),
    ),
    Adam(
        "optimizer.adamw_late", "optimizer", ("adamw_step",),
        "AdamW from a given state, two steps after the 3000th: bias corrections near 1; epsilon 1e-3." + _LOCAL,
        AdamHyper(1e-2, 0.9, 0.999, 1e-3, 0.1), 3000, 2,
    ),
    Adam(
        "optimizer.adamw_very_late", "optimizer", ("adamw_step",),
        "AdamW from a given state, one step beyond the 2^16th, which a counter of 16 bits takes for the fifth; beta2 "
        "is 0.99999, so that its correction is still 0.48." + _LOCAL,
        AdamHyper(1e-2, 0.9, 0.99999, 1e-3, 0.1), 2**16 + 4, 1,
    ),
    ManyTensors(
        "optimizer.adamw_many",
        replace(ADAMW, hyper=AdamHyper(1e-2, 0.9, 0.95, 1e-12, 0.1), before=9, steps=1),
    ),
    Adam(
        "optimizer.adamw_schedule", "optimizer", ("adamw_step",),
        "AdamW with other hyperparameters at each of three steps: learning rates of 0, as a warm-up begins, 1/2 and "
        "1/64, beta1 and beta2 of 0 in turn, a beta2 of 1/2, a decay of 0 at last. A zero is a number, not the lack "
        "of one." + _LOCAL, SCHEDULE[0], 0, len(SCHEDULE), SCHEDULE,
    ),
    MixedTensors("optimizer.adamw_mixed", replace(ADAMW, steps=2)),
    ADAM,
    Adam(
        "optimizer.adam_schedule", "optimizer", ("adam_step",),
        "As optimizer.adamw_schedule, of Adam with coupled decay." + _LOCAL, SCHEDULE[0], 0, len(SCHEDULE), SCHEDULE,
    ),
    MixedTensors("optimizer.adam_mixed", replace(ADAM, steps=2)),
    ManyTensors(
        "optimizer.adam_many", replace(ADAM, hyper=AdamHyper(1e-2, 0.95, 0.999, 1e-5, 0.25), before=9, steps=1)
    ),
    NonfiniteAdam(
        "optimizer.nonfinite", "optimizer", ("adamw_step",),
        "One NaN and one infinity among the gradients of AdamW's first step: they reach their own elements (an "
        "infinity makes the moments infinite and the parameter NaN) and no other; the rest is judged as ever.",
        AdamHyper(1e-2, 0.9, 0.95, 1e-8, 0.1),
    ),
    NonfiniteAdam(
        "optimizer.adam_nonfinite", "optimizer", ("adam_step",),
        "As optimizer.nonfinite, of Adam with coupled decay; epsilon 1e-3.", AdamHyper(1e-2, 0.9, 0.95, 1e-3, 0.25),
    ),
    ROUNDED_SGD,
    EXACT_SGD,
    SGD(
        "optimizer.sgd_schedule", "optimizer", ("sgd_step",),
        "SGD with other hyperparameters at each of four steps: learning rates of 0, 1/2 and 1/64, no momentum at the "
        "second and third, where decay counts and dampening does not; no decay at last. Bounds as of optimizer.sgd.",
        SGD_SCHEDULE[0], len(SGD_SCHEDULE), SGD_SCHEDULE,
    ),
    MixedTensors("optimizer.sgd_mixed", replace(ROUNDED_SGD, steps=2)),
    ManyTensors("optimizer.sgd_many", replace(EXACT_SGD, steps=2)),
    ExactSGD(
        "optimizer.sgd_plain", "optimizer", ("sgd_step",),
        "As optimizer.sgd_exact without momentum: what is kept is the gradient itself.", SGDHyper(0.125, 0.0),
    ),
    NonfiniteSGD(
        "optimizer.sgd_nonfinite", "optimizer", ("sgd_step",),
        "As optimizer.sgd_exact with one NaN among the third step's gradients and one infinity among the last one's: "
        "they reach their own elements and no other, and the NaN stays.", SGDHyper(0.125, 0.5),
    ),
    Strided("optimizer.strided", ADAMW),
    KeptResults("optimizer.adamw_kept", replace(ADAMW, steps=1)),
    Strided("optimizer.adam_strided", replace(ADAM, steps=2)),
    Strided("optimizer.sgd_strided", EXACT_SGD),
)  # fmt: skip
