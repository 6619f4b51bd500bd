# SPDX-License-Identifier: Apache-2.0
"""The language model's head: Ling's NormHead, and cross-entropy over a large vocabulary.

Legend: T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import I64, Array, Arrays, Footprint, Params, arithmetic
from hal_conformance.cases.base import (
    At,
    Base,
    Shape,
    backward,
    keeps_nonfinite,
    leaf,
    loss_backward,
    observed,
    part,
    shape,
    wide,
)
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.losses import SMALL, UPSTREAM
from hal_conformance.cases.narrow import Int32
from hal_conformance.cases.sized import TokenCounts, Wide
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import Finding, exact, joined, judge, merge, structure
from hal_conformance.oracle.cross_entropy import cross_entropy
from hal_conformance.oracle.norm_head import NormHead
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""torch's own default, and everybody's."""

PADDING = 0
"""The other target that does not count in public code: a token of padding."""


class HeadCase(Base):
    """A case that depends on sizes only."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)


@dataclass(frozen=True)
class Normalised(HeadCase):
    """NormHead in training of x alone, in evaluation, in training of both, and in training of the weights alone."""

    through_norm: bool = True

    ROWS = {"tiny": 2039, "small": 4093, "full": 16381}  # noqa: RUF012  primes; float64 of more would not fit

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: weights that share a direction, along which the gradient pushes as a z-loss would.

        Of a random gradient the part along the weights is 1 / sqrt(V) of the whole, and would not be seen. Every
        seventh column has a norm of some 1e-7, to which the epsilon is added, and one is zero: its weights stay zero,
        and the gradient of its norm, which has none there, adds nothing.
        """
        s, rows = shape(p), self.ROWS[p.scale]
        size = make.normal(p.seed, "head/size", rows, 1)
        direction = make.normal(p.seed, "head/direction", 1, s.width)
        weight = (make.normal(p.seed, "head/weight", rows, s.width) + size * direction) / 16.0
        weight[:: rows // 7] *= 8.0  # frequent tokens
        weight[:, 1] *= 2.0**-6
        if p.dtype != "float16":  # which has no numbers so small
            weight[:, 2::7] *= 2.0**-24
            weight[:, 3] = 0.0  # whose gradient, divided by the epsilon, float16 does not hold either
        sign = 1.0 - 2.0 * make.integers(p.seed, "head/sign", 0, 1, s.tokens, 1)
        x = make.activations(p.seed, "head/x", s.tokens, s.width) + sign * direction
        push = make.normal(p.seed, "head/dy", s.tokens, rows) + sign * size.T
        return {
            "x_TD": make.store(x, p.dtype),
            "weight_VD": make.store(weight, p.dtype),
            "dy_TV": make.store(push / 16.0, p.dtype),
        }

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        s, rows, each = shape(p), self.ROWS[p.scale], make.NUMPY_DTYPES[p.dtype].itemsize
        return Footprint((s.width + s.tokens) * rows * each, (2 * s.width + 4 * s.tokens) * rows * each)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        given = tensors["x_TD"], tensors["weight_VD"]
        x, weight = map(leaf, given)

        def head(x: torch.Tensor, weight: torch.Tensor, train: bool = True) -> Any:
            return ops.norm_head(x, weight, train=train, through_norm=self.through_norm)

        y = {"first": head(x, given[1]), "eval": head(x, weight, train=False), "again": head(x, weight)}
        y["last"] = head(given[0], weight)
        trained = {
            "first": {"dx_alone_TD": x}, "again": {"dx_TD": x, "dweight_VD": weight},
            "last": {"dweight_alone_VD": weight},
        }  # fmt: skip
        gradients: dict[str, torch.Tensor | None] = {}
        for name, leaves in trained.items():
            backward(y[name], tensors["dy_TV"])
            for gradient, tensor in leaves.items():
                gradients[gradient], tensor.grad = tensor.grad, None
        return observed({**{f"{name}_TV": logits for name, logits in y.items()}, **gradients})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        x, weight = inputs["x_TD"], inputs["weight_VD"]
        logits = ((len(x), len(weight)), p.dtype)
        every = ("first_TV", "eval_TV", "again_TV", "last_TV")
        wrong = structure(outputs, {
            **dict.fromkeys(every, logits), **dict.fromkeys(("dx_TD", "dx_alone_TD"), (x.shape, p.dtype)),
            **dict.fromkeys(("dweight_VD", "dweight_alone_VD"), (weight.shape, p.dtype)),
        })  # fmt: skip
        if wrong is not None:
            return wrong
        head = NormHead(x, weight, p.dtype, arithmetic(contract, p.dtype))
        dx, dweight = head.backward(inputs["dy_TV"], self.through_norm)
        y = head.logits.bounded(p.dtype)
        free = _independent(inputs)
        found = [judge(name, outputs[name], y, independent=free.y) for name in every]
        of_x, of_weight = dx.bounded(p.dtype), dweight.bounded(p.dtype)
        found += [judge(name, outputs[name], of_x, independent=free.dx) for name in ("dx_TD", "dx_alone_TD")]
        trained = ("dweight_VD", "dweight_alone_VD")
        found += [judge(name, outputs[name], of_weight, independent=free.dweight) for name in trained]
        return merge(found)


class _Independent(NamedTuple):
    """How many errors of each are independent: the safe number for `detectors.Meter`."""

    y: int
    dx: int
    dweight: int


def _independent(inputs: Arrays) -> _Independent:
    """Return the numbers for NormHead.

    Logits of a token share the norms' errors, and those of an entry its normalised weights', which are stored: of the
    rows and the columns of [T, V] as many are independent as there are of the fewer. So it is with the gradients [T, D]
    of tokens, whose columns share weights; gradients of a column of the weights share its norm's error.
    """
    tokens, width = inputs["x_TD"].shape
    return _Independent(min(tokens, len(inputs["weight_VD"])), min(tokens, width), width)


class Narrow(Normalised):
    """NormHead once, with a small vocabulary: what does not depend on its size."""

    ROWS = dict.fromkeys(Normalised.ROWS, 257)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        x, weight = leaf(tensors["x_TD"]), leaf(tensors["weight_VD"])
        y = ops.norm_head(x, weight, train=True, through_norm=self.through_norm)
        backward(y, tensors["dy_TV"])
        return observed({"y_TV": y, "dx_TD": x.grad, "dweight_VD": weight.grad})

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shapes and dtypes."""
        shapes = {"y_TV": inputs["dy_TV"].shape, "dx_TD": inputs["x_TD"].shape, "dweight_VD": inputs["weight_VD"].shape}
        return structure(outputs, {name: (shape, p.dtype) for name, shape in shapes.items()})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        head = NormHead(inputs["x_TD"], inputs["weight_VD"], p.dtype, arithmetic(contract, p.dtype))
        dx, dweight = head.backward(inputs["dy_TV"], self.through_norm)
        free = _independent(inputs)
        pairs = {"y_TV": (head.logits, free.y), "dx_TD": (dx, free.dx), "dweight_VD": (dweight, free.dweight)}
        return merge(
            judge(name, outputs[name], want.bounded(p.dtype), independent=n) for name, (want, n) in pairs.items()
        )


class FewRows(Normalised):
    """As little vocabulary as makes room for wide rows."""

    ROWS = dict.fromkeys(Normalised.ROWS, 97)


class OneSize(Normalised):
    """NormHead of one size at every scale, in one dtype: what does not depend on them."""

    SHAPE: Shape

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return ("bfloat16",)

    def at(self, p: Params) -> At:
        """Return the instance with its sizes."""
        return At(p.preset, p.dtype, p.scale, p.seed, self.SHAPE)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return super().footprint(self.at(p))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return super().inputs(self.at(p))


class ManyRows(OneSize):
    """More vocabulary than 16 bits count, for few narrow tokens."""

    ROWS = dict.fromkeys(Normalised.ROWS, 70_001)
    SHAPE = Shape(5, 16, 16)


class ManyNormalised(OneSize, Narrow):
    """More tokens than 16 bits count, for little vocabulary."""

    ROWS = dict.fromkeys(Normalised.ROWS, 16)
    SHAPE = Shape(65_792, 8, 8)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: no channel is so large that many tokens have nearly the same logits, and errors."""
        arrays = super().inputs(p)
        return {**arrays, "x_TD": make.store(make.normal(p.seed, "head/x", *arrays["x_TD"].shape), p.dtype)}


class NanInput(Narrow):
    """One element of x is NaN."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        at = len(arrays["x_TD"]) // 2
        return {**arrays, "x_TD": make.with_one(arrays["x_TD"], np.nan, p.seed, "head/nan", at)}

    @np.errstate(invalid="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the oracle's own NaN are the expected ones."""
        return super().judge(inputs, outputs, p, contract)


class NoTokens(Narrow):
    """Zero tokens."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array if name == "weight_VD" else array[:0] for name, array in super().inputs(p).items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: empty results, and a gradient of the weights that is exactly zero."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        return merge(exact(name, array, np.zeros_like(array)) for name, array in sorted(outputs.items()))


class TwoWeights(Narrow):
    """Weights that change between two calls, where they lie."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the same rows in reverse, every third column twice or four times as large."""
        arrays = super().inputs(p)
        weight = wide(arrays["weight_VD"])
        then = weight[::-1] * 2.0 ** (np.arange(weight.shape[1]) % 3)
        return {name: arrays[name] for name in ("x_TD", "weight_VD")} | {"then_VD": make.store(then, p.dtype)}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: the results of the first calls are kept."""
        weight, y = tensors["weight_VD"].clone(), {}
        for when in ("first", "then"):
            if when == "then":
                weight.copy_(tensors["then_VD"])
            for mode, train in (("train", True), ("eval", False)):
                y[f"{when}_{mode}_TV"] = ops.norm_head(tensors["x_TD"], weight, train=train)
        return observed(y)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        x, rule = inputs["x_TD"], arithmetic(contract, p.dtype)
        every = {f"{when}_{mode}_TV": name for when, name in (("first", "weight_VD"), ("then", "then_VD"))
                 for mode in ("train", "eval")}  # fmt: skip
        wrong = structure(outputs, dict.fromkeys(every, ((len(x), len(inputs["weight_VD"])), p.dtype)))
        if wrong is not None:
            return wrong
        want = {name: NormHead(x, inputs[name], p.dtype, rule).logits.bounded(p.dtype) for name in set(every.values())}
        return merge(judge(name, outputs[name], want[of], independent=len(x)) for name, of in every.items())


@dataclass(frozen=True)
class CrossEntropy(HeadCase):
    """The loss and the gradient of the logits.

    Attributes:
        z: coefficient of the z-loss.
        ignored: the target that does not count.
        upstream: gradient of the loss.
    """

    z: float = 0.0
    ignored: int = IGNORED
    upstream: float = UPSTREAM

    SIZES = {"tiny": (17, 8191), "small": (33, 65521), "full": (129, 126464)}  # noqa: RUF012  Ling-Lite's at full

    def size(self, p: Params) -> tuple[int, int]:
        """Return T and V."""
        return self.SIZES[p.scale]

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        tokens, vocabulary = self.size(p)
        each = tokens * vocabulary * make.NUMPY_DTYPES[p.dtype].itemsize
        return Footprint(each, each)

    def targets(self, p: Params, tokens: int, vocabulary: int) -> I64:
        """Return [T] targets, of which every fourth does not count; the vocabulary's first and last are among them."""
        targets = make.integers(p.seed, "entropy/targets", 0, vocabulary - 1, tokens)
        targets[4::16] = 0
        targets[12::16] = vocabulary - 1
        targets[2::4] = self.ignored
        return targets

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        Frequent tokens have larger logits. Token 3 is shifted by 10,000; in token 5 one logit is 30,000, and it is the
        right one; in token 7 all are alike; token 8 is right by 12, so that p is nearly 1 and p - 1 cancels. Tokens 9
        and 11 are shifted by -200 and -11,000: a maximum that starts at 0 or -1e4 leaves the logarithm of zero.
        """
        tokens, vocabulary = self.size(p)
        x = make.normal(p.seed, "entropy/logits", tokens, vocabulary) * 3.0
        x[:, :: max(1, vocabulary // 64)] += 6.0
        targets = self.targets(p, tokens, vocabulary)
        if tokens > 11:
            x[3] += 10000.0
            x[5, targets[5]] = 30000.0
            x[7] = -2.5
            x[8, targets[8]] = 24.0
            x[9] -= 200.0
            x[11] -= 11000.0
        return {"logits_TV": make.store(x, p.dtype), "targets_T": targets}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        loss, gradient = self.step(ops, tensors["logits_TV"], tensors["targets_T"])
        return observed({"loss": loss, "dlogits_TV": gradient})

    def step(self, ops: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """Return the loss and the gradient."""
        x = leaf(logits)
        loss = ops.cross_entropy(x, targets, ignore_index=self.ignored, z_coefficient=self.z)
        loss_backward(loss, self.upstream, x)
        return loss, x.grad

    def expected(self, logits: Array, targets: I64) -> tuple[Bounded, Bounded]:
        """Return the loss, and the gradient before it is stored."""
        loss, gradient = cross_entropy(logits, targets, self.ignored, self.z)
        return loss, gradient.scaled(self.upstream)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        x = inputs["logits_TV"]
        wrong = structure(outputs, {"loss": ((), "float32"), "dlogits_TV": (x.shape, p.dtype)})
        if wrong is not None:
            return wrong
        loss, gradient = self.expected(x, inputs["targets_T"])
        return merge([judge("loss", outputs["loss"], loss), self.gradient("dlogits", outputs, gradient, p)])

    def gradient(self, name: str, outputs: Arrays, expected: Bounded, p: Params) -> Finding:
        """Judge a gradient: elements of a token share its normaliser."""
        return judge(name, outputs[f"{name}_TV"], expected.stored(p.dtype), independent=len(expected.value))


class WithZ(CrossEntropy):
    """With the z-loss; a small vocabulary is enough."""

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return (shape(p).tokens, 61) if isinstance(p, At) else (self.SIZES[p.scale][0], 1021)


@dataclass(frozen=True)
class Sized(CrossEntropy):
    """Of sizes of its own at every scale."""

    at: tuple[int, int] = (1, 1)

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return self.at


class LargeVocabulary(Sized):
    """More entries than 16 bits count."""

    def targets(self, p: Params, tokens: int, vocabulary: int) -> I64:
        """See `CrossEntropy.targets`: those of odd tokens are beyond 65,535."""
        targets = super().targets(p, tokens, vocabulary)
        targets[1::2] = make.integers(p.seed, "entropy/late", 2**16, vocabulary - 1, len(targets[1::2]))
        return targets


class ManyTokens(Sized):
    """More tokens than 16 bits count, in one dtype."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return ("bfloat16",)


class Masked(CrossEntropy):
    """A part of the vocabulary is masked."""

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return self.SIZES[p.scale][0], 509

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: logits of -inf, the last ones and others, and no target among them."""
        arrays = super().inputs(p)
        x, targets = arrays["logits_TV"].copy(), arrays["targets_T"]
        masked = make.integers(p.seed, "entropy/masked", 0, 4, *x.shape) == 0
        masked[:, -5:] = True
        rows = np.flatnonzero(targets != self.ignored)
        masked[rows, targets[rows]] = False
        x[masked] = -np.inf
        return {"logits_TV": x, "targets_T": targets}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


class Uniform(CrossEntropy):
    """Logits that are all alike."""

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return 21, 64

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: 16 of 21 tokens count, so that every gradient is a small integer over a power of two."""
        tokens, vocabulary = self.size(p)
        targets = self.targets(p, tokens, vocabulary)
        if p.seed % 2:
            targets = targets[::-1].copy()
        x = np.repeat(make.integers(p.seed, "uniform/levels", -40, 40, tokens, 1) / 4.0, vocabulary, axis=1)
        return {"logits_TV": make.store(x, p.dtype), "targets_T": targets}

    def gradient(self, name: str, outputs: Arrays, expected: Bounded, p: Params) -> Finding:
        """See `CrossEntropy.gradient`: what float32 may lose is not seen in 16 bits."""
        if p.dtype == "float32":
            return super().gradient(name, outputs, expected, p)
        return exact(name, outputs[f"{name}_TV"], make.store(expected.value, p.dtype))


class NanToken(CrossEntropy):
    """A token of NaN, once where it counts and once where it does not."""

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return self.SIZES[p.scale][0], 509

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: token 6 is ignored in one vector of targets, and counts in the other."""
        arrays = super().inputs(p)
        x, counted = arrays["logits_TV"].copy(), arrays["targets_T"].copy()
        x[6], counted[6] = np.nan, 5
        return {"logits_TV": x, "targets_T": arrays["targets_T"], "counted_T": counted}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        loss, ignored = self.step(ops, tensors["logits_TV"], tensors["targets_T"])
        _, counted = self.step(ops, tensors["logits_TV"], tensors["counted_T"])
        return observed({"loss": loss, "ignored_TV": ignored, "counted_TV": counted})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the NaN token's own gradient may be anything; torch's is NaN even where it is ignored."""
        x = inputs["logits_TV"]
        expected = {"loss": ((), "float32"), "ignored_TV": (x.shape, p.dtype), "counted_TV": (x.shape, p.dtype)}
        wrong = structure(outputs, expected)
        if wrong is not None:
            return wrong
        others = np.arange(len(x)) != 6
        loss, ignored = self.expected(x, inputs["targets_T"])
        _, counted = self.expected(x, inputs["counted_T"])
        found = [judge("loss", outputs["loss"], loss)]
        for name, whole in (("ignored", ignored), ("counted", counted)):
            part = Bounded(whole.value[others], whole.bound[others], whole.var[others])
            found.append(self.gradient(name, {f"{name}_TV": outputs[f"{name}_TV"][others]}, part, p))
        return merge(found)


class OneCounts(CrossEntropy):
    """Exactly one token counts, and all but one."""

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return self.SIZES[p.scale][0], 509

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: which one it is depends on the seed."""
        arrays = super().inputs(p)
        logits, tokens = arrays["logits_TV"], len(arrays["targets_T"])
        every = make.integers(p.seed, "entropy/every", 0, logits.shape[1] - 1, tokens)
        alone = np.arange(tokens) == make.integers(p.seed, "entropy/alone", 0, tokens - 1, 1)
        return {
            "logits_TV": logits,
            "one_counts_T": np.where(alone, every, self.ignored),
            "one_ignored_T": np.where(alone, self.ignored, every),
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        found: dict[str, Any] = {}
        for name in self.WHICH:
            loss, gradient = self.step(ops, tensors["logits_TV"], tensors[f"{name}_T"])
            found |= {f"{name}/loss": loss, f"{name}/dlogits_TV": gradient}
        return observed(found)

    WHICH = ("one_counts", "one_ignored")

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        x = inputs["logits_TV"]
        return joined({
            name: super(OneCounts, self).judge(
                {"logits_TV": x, "targets_T": inputs[f"{name}_T"]}, part(outputs, name), p, contract
            )
            for name in self.WHICH
        })  # fmt: skip


class NoneCount(CrossEntropy):
    """No token, and no token that counts."""

    def size(self, p: Params) -> tuple[int, int]:
        """See `CrossEntropy.size`."""
        return 17, 509

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        return {"logits_TV": arrays["logits_TV"], "targets_T": np.full_like(arrays["targets_T"], self.ignored)}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        loss, gradient = self.step(ops, tensors["logits_TV"], tensors["targets_T"])
        empty, nothing = self.step(ops, tensors["logits_TV"][:0], tensors["targets_T"][:0])
        return observed({"loss": loss, "dlogits_TV": gradient, "empty": empty, "nothing_TV": nothing})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        shape = inputs["logits_TV"].shape
        wrong = structure(outputs, {
            "loss": ((), "float32"), "empty": ((), "float32"),
            "dlogits_TV": (shape, p.dtype), "nothing_TV": ((0, shape[1]), p.dtype),
        })  # fmt: skip
        if wrong is not None:
            return wrong
        zeros = {name: np.zeros_like(wide(outputs[name])) for name in ("loss", "empty", "dlogits_TV", "nothing_TV")}
        return merge(exact(name, outputs[name], zero) for name, zero in zeros.items())


_HEAD, _LOSS = ("norm_head",), ("cross_entropy",)
_OTHER = "The z-loss has another coefficient, 3e-4, and the ignored target is 0, a token of padding."
NORMALISED = Normalised(
    "head.norm", "head", _HEAD,
    "Ling's NormHead in training, then in evaluation, then in training again: the same logits each time, nothing "
    "written into the weights, and both gradients, that of the weights through the norm; each of them, too, where the "
    "other is frozen. Every seventh column's norm is about the epsilon of 1e-7 (not in float16), which is added, not a "
    "lower limit, and one column is zero. The upstream gradient pushes along the weights, as a z-loss does. "
    "Bound: variances chained over the norm of each column, the stored weights and the product (oracle.norm_head).",
)  # fmt: skip
MANY_NORMALISED = ManyNormalised(
    "head.norm_many_tokens", "head", _HEAD,
    "NormHead once, 65,792 tokens and V = 16: more tokens than 16 bits count, and than a grid of CUDA's has blocks "
    "along its second axis.",
)  # fmt: skip
MANY_ROWS = ManyRows(
    "head.norm_many_rows", "head", _HEAD,
    "As head.norm, V = 70,001 for five tokens of 16 channels: more than 16 bits count, and than a grid of CUDA's has "
    "blocks along its second axis.",
)  # fmt: skip
FEW_ROWS = FewRows("head.norm", "head", _HEAD, "V = 97.")
ENTROPY = CrossEntropy(
    "head.cross_entropy", "head", _LOSS,
    "Mean over the tokens that count of logsumexp - logit, in float32, and its gradient, over 8,191 to 126,464 tokens "
    "of vocabulary; a quarter of the targets is ignored, the first and the last entry are targets, and some rows have "
    "huge, equal or decided logits, or all of them far below zero; for an upstream gradient that is not 1. Local "
    "bound: exp, the sum with stagnation, log, and each rounding (oracle.cross_entropy).",
)  # fmt: skip
WITH_Z = WithZ(
    "head.cross_entropy_z", "head", _LOSS, "As head.cross_entropy with a z-loss of 1e-2, V = 1,021.", 1e-2
)  # fmt: skip
MASKED = Masked(
    "head.masked_vocabulary", "head", _LOSS,
    "As head.cross_entropy, V = 509, where a fifth of the logits is -inf, as of padding of the vocabulary: they "
    "add nothing to the sum and their gradient is 0; no 0 times inf.",
)  # fmt: skip
CASES = (
    NORMALISED,
    Normalised(
        "head.norm_constant", "head", _HEAD,
        "As head.norm, with the norm a constant in the backward pass, as in Ling's published code.", through_norm=False,
    ),
    Wide("head.norm_wide", FEW_ROWS, of=Shape(9, 1032, 8)),
    NanInput(
        "head.norm_nan", "head", _HEAD,
        "NormHead with one NaN in one token, V = 257: NaN are the token's logits and the gradient of that column of "
        "the weights, and nothing else.",
    ),
    NoTokens("head.norm_no_tokens", "head", _HEAD, "Zero tokens: a gradient of the weights that is exactly zero."),
    TwoWeights(
        "head.norm_two_weights", "head", _HEAD,
        "NormHead in training and evaluation, V = 257; then other weights are written where the first were, as a step "
        "does, and both are called again: normalised weights, norms and results of the first calls are not kept.",
    ),
    ENTROPY,
    WITH_Z,
    Sized(
        "head.one_token", "head", _LOSS,
        "As head.cross_entropy, one token and V = 2,048: a mean over 1, and whole blocks of the vocabulary.",
        at=(1, 2048),
    ),
    LargeVocabulary(
        "head.large_vocabulary", "head", _LOSS,
        "As head.cross_entropy, with a z-loss, five tokens and V = 70,001 at every scale, every second target beyond "
        "65,535: 16 bits do not hold it.",
        at=(5, 70001), z=1e-2,
    ),
    Sized(
        "head.whole_vocabulary", "head", _LOSS,
        "As head.cross_entropy, V = 1,024: whole blocks of 128 and of 256. The ignored target is -1.", ignored=-1,
        at=(17, 1024),
    ),
    ManyTokens(
        "head.cross_entropy_many", "head", _LOSS,
        "As head.cross_entropy, 65,792 tokens and V = 8: more tokens than 16 bits count, and than a grid of CUDA's has "
        "blocks along its second axis.", at=(65_792, 8),
    ),
    Sized(
        "head.many_tokens", "head", _LOSS,
        "As head.cross_entropy, 1,031 tokens and V = 61: more than a block of 256 or 1,024 threads has. The ignored "
        "target is 0.", ignored=PADDING, at=(1031, 61),
    ),
    MASKED,
    Uniform(
        "head.uniform", "head", _LOSS,
        "Equal logits, V = 64, 16 of 21 tokens count: the gradients are (1/64 - [target]) / 4, bit by bit in 16 "
        "bits (upstream 4). A mean over all tokens, and a missing 1/N, show.",
    ),
    NanToken(
        "head.nan_token", "head", _LOSS,
        "A token of NaN: ignored, it does not reach the loss; counted or not, it does not reach other tokens' "
        "gradients.",
    ),
    OneCounts(
        "head.one_counts", "head", _LOSS,
        "As head.cross_entropy, V = 509, where one token counts, and where all but one do: the mean is over 1 token, "
        "and over T - 1.",
    ),
    NoneCount("head.none_count", "head", _LOSS, "No tokens, or none that counts: loss and gradient are exactly 0."),
    MANY_ROWS,
    MANY_NORMALISED,
    KeptResults("head.norm_kept", NORMALISED), KeptResults("head.cross_entropy_kept", WITH_Z),
    Int32("head.cross_entropy_int32", WITH_Z),
    Untrained("head.cross_entropy_untrained", WithZ("head.cross_entropy", "head", _LOSS, "V = 1,021."), ("loss",)),
    Untrained("head.cross_entropy_z_untrained", WITH_Z, ("loss",)),
    Untrained("head.norm_untrained", FEW_ROWS, ("first_TV", "eval_TV", "again_TV", "last_TV")),
    Untrained("head.masked_untrained", MASKED, ("loss",), modes=IN_SERVICE),
    WithZ(
        "head.cross_entropy_small_upstream", "head", _LOSS,
        "As head.cross_entropy_z, for an upstream gradient of 5e-5.", 1e-2, upstream=SMALL,
    ),
    Shifted("head.norm_shifted", NORMALISED), Shifted("head.cross_entropy_shifted", WITH_Z),
    Strided("head.norm_strided", NORMALISED), Sliced("head.norm_sliced", NORMALISED),
    Sliced("head.cross_entropy_sliced", WITH_Z),
    TokenCounts("head.norm_token_counts", FEW_ROWS), TokenCounts("head.cross_entropy_token_counts", WITH_Z),
    Strided("head.cross_entropy_strided", WithZ("head.cross_entropy_z", "head", _LOSS, _OTHER, 3e-4, PADDING)),
)  # fmt: skip
