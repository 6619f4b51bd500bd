# SPDX-License-Identifier: Apache-2.0
"""Optimisers and gradients: honest variants are green whatever their order of operations, wrong ones are caught."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.adam import adam

from hal.contract import Contract
from hal.errors import ShapeError
from hal.moe.optimizer_ops import CLIP_EPSILON, AdamHyper, AdamStep, Clipped, SGDHyper, SGDStep
from hal.moe.torch_ops import TorchMoEOps
from hal.moe.torch_optimizer_ops import TorchOptimizerOps
from hal_conformance import arrays as codec
from hal_conformance import inputs as make
from hal_conformance.bounds import Bounded
from hal_conformance.case import Params
from hal_conformance.cases import gradients, optimizer
from hal_conformance.oracle import adam as oracle_adam
from hal_conformance.oracle.accumulation import accumulate
from hal_conformance.oracle.clipping import clip_grad_norm
from hal_conformance.verdicts import Status

CASES = {case.name: case for case in (*optimizer.CASES, *gradients.CASES)}
ALL = tuple(CASES.values())
CPU = torch.device("cpu")


class Honest(TorchOptimizerOps):
    """The portable implementation; the experts are those of `hal.moe`."""

    experts = TorchMoEOps().experts


def judge(case, ops, dtype, seed=0, contract=None):
    params = Params(case.presets()[0], dtype, "tiny", seed)
    inputs = case.inputs(params)
    outputs = case.run(ops, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    with np.errstate(all="ignore"):
        return case.judge(
            inputs, {name: codec.from_torch(t) for name, t in outputs.items()}, params, contract or Contract()
        )


def verdicts(ops, seed, cases=ALL):
    return {
        (case.name, dtype): judge(case, ops, dtype, seed)
        for case in cases
        if all(hasattr(ops, name) for name in case.needs)
        for dtype in case.dtypes()
    }


def each(function, *lists):
    """Apply a function of one parameter to lists of all, and return its results as lists."""
    return [list(made) for made in zip(*(function(*some) for some in zip(*lists, strict=True)), strict=True)]


class Loops(Honest):
    foreach = False


class Lists(Honest):
    foreach = True


class Fused(Honest):
    """torch's fused kernel, which computes in another order."""

    def _adam(self, parameters, gradients, first, second, step, hyper, *, decoupled):
        p, m, v = ([self.owned(t) for t in some] for some in (parameters, first, second))
        steps = [torch.tensor(float(step - 1)) for _ in p]
        adam(
            p, [self.read(g) for g in gradients], m, v, [], steps, fused=True, amsgrad=False, beta1=hyper.beta1,
            beta2=hyper.beta2, lr=hyper.lr, weight_decay=hyper.weight_decay, eps=hyper.epsilon, maximize=False,
            decoupled_weight_decay=decoupled,
        )  # fmt: skip
        return AdamStep([a.to(b.dtype) for a, b in zip(p, parameters, strict=True)], m, v)

    def owned(self, t):
        return t.float().clone(memory_format=torch.contiguous_format)

    def read(self, g):
        return self.owned(g)


class FusedAsItIs(Fused):
    """torch's fused kernel on gradients as they are stored: on the CPU it reads them as if they were contiguous."""

    def read(self, g):
        return g.float()


class Written(Honest):
    """Adam as it is written down, in a dtype of its choice; what differs between subclasses is one method each."""

    wide = torch.float32

    def _adam(self, parameters, gradients, first, second, step, hyper, *, decoupled):
        def one(p, g, m, v):
            wide = [t.to(self.wide) for t in (p, g, m, v)]
            return self.step(*wide, step, hyper, decoupled, p.dtype)

        return AdamStep(*each(one, parameters, gradients, first, second))

    def step(self, p, g, m, v, t, h, decoupled, dtype):
        g = self.coupled(g, p, h, decoupled)
        m, v = self.moments(m, v, g, h)
        p = self.decayed(p, h, decoupled) - self.update(m, v, t, h)
        return self.stored(p, dtype), self.kept(m), self.kept(v)

    def coupled(self, g, p, h, decoupled):
        return g if decoupled else g + h.weight_decay * p

    def decayed(self, p, h, decoupled):
        return p * (1 - h.lr * h.weight_decay) if decoupled else p

    def moments(self, m, v, g, h):
        return h.beta1 * m + (1 - h.beta1) * g, h.beta2 * v + (1 - h.beta2) * g * g

    def corrections(self, t, h):
        return 1 - h.beta1**t, 1 - h.beta2**t

    def update(self, m, v, t, h):
        c1, c2 = self.corrections(t, h)
        return h.lr * ((m / c1) / ((v / c2).sqrt() + h.epsilon))

    def stored(self, p, dtype):
        return p.to(dtype)

    def kept(self, moment):
        return moment.float()


class Wide(Written):
    """In float64 inside: more precise than promised is honest, too."""

    wide = torch.float64

    def clip_grad_norm(self, gradients, max_norm):
        norm = torch.cat([g.double().reshape(-1) for g in gradients]).norm()
        factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        return Clipped([(g.double() * factor).to(g.dtype) for g in gradients], norm.float())


class Apex(Written):
    """As Apex's kernel: 1 - beta in float32, the decay inside the update."""

    def moments(self, m, v, g, h):
        beta1, beta2 = torch.tensor(h.beta1), torch.tensor(h.beta2)
        return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g

    def corrections(self, t, h):
        beta1, beta2 = torch.tensor(h.beta1), torch.tensor(h.beta2)
        return 1 - beta1**t, 1 - beta2**t

    def step(self, p, g, m, v, t, h, decoupled, dtype):
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        c1, c2 = self.corrections(t, h)
        update = (m / c1) / ((v / c2).sqrt() + h.epsilon)
        if decoupled:
            update = update + h.weight_decay * p
        return (p - h.lr * update).to(dtype), m, v


class Interpolates(Written):
    """m + (1 - beta) (g - m), and the step size taken before the quotient."""

    def moments(self, m, v, g, h):
        return m + (1 - h.beta1) * (g - m), v + (1 - h.beta2) * (g * g - v)

    def update(self, m, v, t, h):
        c1, c2 = self.corrections(t, h)
        return (h.lr / c1) * m / (v.sqrt() / c2**0.5 + h.epsilon)


class Sequential(Honest):
    """Squares added one after the other; weights taken by the token count first, divided at the end."""

    def clip_grad_norm(self, gradients, max_norm):
        total = np.float32(0)
        for square in torch.cat([g.float().reshape(-1) for g in gradients]).square().numpy():
            total = np.float32(total + square)
        norm = torch.tensor(np.sqrt(total))
        factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        return Clipped([(g.float() * factor).to(g.dtype) for g in gradients], norm)

    def accumulate_gradients(self, parts, tokens):
        return [
            torch.stack([n * g.float() for n, g in zip(tokens, some, strict=True)]).flip(0).sum(0) / sum(tokens)
            for some in zip(*parts, strict=True)
        ]

    def sgd_step(self, parameters, gradients, momentum, step, hyper):
        def one(p, g, b):
            d = hyper.weight_decay * p.float() + g.float()
            b = d if step == 1 else torch.addcmul(hyper.momentum * b, d, torch.tensor(1 - hyper.dampening))
            return torch.addcmul(p.float(), b, torch.tensor(-hyper.lr)).to(p.dtype), b

        return SGDStep(*each(one, parameters, gradients, momentum))


HONEST = {cls.__name__: cls() for cls in (Loops, Lists, Fused, Written, Wide, Apex, Interpolates, Sequential)}


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_honest_implementation_is_green_in_every_case(name, seed):
    found = verdicts(HONEST[name], seed)
    assert len(found) == 2 * len(CASES)
    assert {key: verdict for key, verdict in found.items() if verdict.status.colour != "green"} == {}


class CoupledDecay(Written):
    """Decay through the gradient, where it was to be decoupled (FlagGems#4988, the other way round)."""

    def coupled(self, g, p, h, decoupled):
        return g + h.weight_decay * p

    def decayed(self, p, h, decoupled):
        return p


class DecoupledDecay(Written):
    """Decay from the parameter, where it was to be coupled (FlagGems#4988)."""

    def coupled(self, g, p, h, decoupled):
        return g

    def decayed(self, p, h, decoupled):
        return p * (1 - h.lr * h.weight_decay)


class DecayWithoutRate(Written):
    """The decay is not multiplied by the learning rate."""

    def decayed(self, p, h, decoupled):
        return p * (1 - h.weight_decay) if decoupled else p


class DecayAfterStep(Written):
    """The decay is taken of the stepped parameter."""

    def step(self, p, g, m, v, t, h, decoupled, dtype):
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        return self.decayed(p - self.update(m, v, t, h), h, decoupled).to(dtype), m, v


class EpsilonInsideTheRoot(Written):
    def update(self, m, v, t, h):
        c1, c2 = self.corrections(t, h)
        return h.lr * (m / c1) / (v / c2 + h.epsilon**2).sqrt()


class EpsilonBeforeCorrection(Written):
    """Kingma and Ba's shorter form, whose epsilon is another one."""

    def update(self, m, v, t, h):
        c1, c2 = self.corrections(t, h)
        return h.lr * c2**0.5 / c1 * m / (v.sqrt() + h.epsilon)


class NoEpsilonWorthMentioning(Written):
    def update(self, m, v, t, h):
        c1, c2 = self.corrections(t, h)
        return h.lr * (m / c1) / ((v / c2).sqrt() + 1e-30)


class NoCorrection(Written):
    def corrections(self, t, h):
        return 1.0, 1.0


class NoCorrectionAfterTheFirst(Written):
    """Step 2 and later are not corrected."""

    def corrections(self, t, h):
        return super().corrections(t, h) if t == 1 else (1.0, 1.0)


class StepOffByOne(Written):
    """The step is counted after the update, from 1 on."""

    def corrections(self, t, h):
        return super().corrections(t + 1, h)


class MomentsInBfloat16(Written):
    def kept(self, moment):
        return moment.bfloat16().float()


class SecondMomentOfTheSum(Written):
    """The square of the first moment instead of the gradient's."""

    def moments(self, m, v, g, h):
        m = h.beta1 * m + (1 - h.beta1) * g
        return m, h.beta2 * v + (1 - h.beta2) * m * m


class TruncatesParameters(Written):
    """Rounds to bfloat16 by cutting off."""

    def stored(self, p, dtype):
        if dtype == torch.bfloat16:
            return (p.view(torch.int32) & -65536).view(torch.float32).to(dtype)
        return p.to(dtype)


class StepsInBfloat16(Written):
    """The update is rounded to the parameter's dtype before it is subtracted."""

    def step(self, p, g, m, v, t, h, decoupled, dtype):
        m, v = self.moments(m, v, self.coupled(g, p, h, decoupled), h)
        update = self.update(m, v, t, h).bfloat16()
        return (self.decayed(p, h, decoupled).bfloat16() - update).to(dtype), m, v


class ForgetsTheIdle(Written):
    """Parameters whose gradients are all zero are skipped: neither their decay nor their moments go on."""

    def step(self, p, g, m, v, t, h, decoupled, dtype):
        return super().step(p, g, m, v, t, h, decoupled, dtype) if g.any() else (p.to(dtype), m, v)


class LosesTail(Written):
    """Elements beyond a multiple of 16 are not stepped."""

    def step(self, p, g, m, v, t, h, decoupled, dtype):
        stepped, m, v = super().step(p, g, m, v, t, h, decoupled, dtype)
        kept = p.numel() // 16 * 16
        stepped = torch.cat([stepped.reshape(-1)[:kept], p.reshape(-1)[kept:].to(dtype)]).view(p.shape)
        return stepped, m, v


class ReplacesNan(Written):
    """A NaN in a gradient is taken for zero."""

    def coupled(self, g, p, h, decoupled):
        return super().coupled(g.nan_to_num(0.0), p, h, decoupled)


class SpreadsNan(Written):
    """One NaN makes a parameter NaN as a whole."""

    def coupled(self, g, p, h, decoupled):
        return g + 0 * g.nan_to_num(posinf=0.0).sum() + (torch.nan if g.isnan().any() else 0)


class DampensTheFirst(Honest):
    def sgd_step(self, parameters, gradients, momentum, step, hyper):
        def one(p, g, b):
            d = g.float() + hyper.weight_decay * p.float()
            b = hyper.momentum * b + (1 - hyper.dampening) * d
            return (p.float() - hyper.lr * b).to(p.dtype), b

        return SGDStep(*each(one, parameters, gradients, momentum))


class IgnoresDampening(Honest):
    def sgd_step(self, parameters, gradients, momentum, step, hyper):
        return super().sgd_step(
            parameters, gradients, momentum, step, SGDHyper(hyper.lr, hyper.momentum, 0.0, hyper.weight_decay)
        )


class NesterovUnasked(Honest):
    def sgd_step(self, parameters, gradients, momentum, step, hyper):
        _, kept = super().sgd_step(parameters, gradients, momentum, step, hyper)

        def one(p, g, b):
            d = g.float() + hyper.weight_decay * p.float()
            return ((p.float() - hyper.lr * (d + hyper.momentum * b)).to(p.dtype),)

        return SGDStep(*each(one, parameters, gradients, kept), kept)


class RateInsideMomentum(Honest):
    """Sutskever's form: the momentum holds steps, not gradients."""

    def sgd_step(self, parameters, gradients, momentum, step, hyper):
        def one(p, g, b):
            d = g.float() + hyper.weight_decay * p.float()
            b = hyper.lr * d if step == 1 else hyper.momentum * b + hyper.lr * (1 - hyper.dampening) * d
            return (p.float() - b).to(p.dtype), b

        return SGDStep(*each(one, parameters, gradients, momentum))


class TruncatesSGD(Honest):
    def sgd_step(self, parameters, gradients, momentum, step, hyper):
        wide = [p.float() for p in parameters]
        stepped, kept = super().sgd_step(wide, gradients, momentum, step, hyper)
        cut = [(p.view(torch.int32) & -65536).view(torch.float32).bfloat16() for p in stepped]
        return SGDStep(cut if parameters[0].dtype == torch.bfloat16 else stepped, kept)


class Clips(Honest):
    """Clipping as it is written down."""

    def clip_grad_norm(self, gradients, max_norm):
        wide = [g.float() for g in gradients]
        norm = self.norm(wide)
        return Clipped(
            [(g * self.factor(norm, max_norm)).to(o.dtype) for g, o in zip(wide, gradients, strict=True)], norm
        )

    def norm(self, gradients):
        return torch.stack([g.norm() for g in gradients]).norm()

    def factor(self, norm, max_norm):
        return (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)


class NormWithoutExperts(Clips):
    """The norm is of the dense gradients alone (Megatron-LM PR#5916)."""

    def norm(self, gradients):
        return super().norm([gradients[0], gradients[1], gradients[-1]])


class NormWithoutTheLast(Clips):
    """The single element at the end is left out."""

    def norm(self, gradients):
        return super().norm(gradients[:-1])


class NormWithAnExpertTwice(Clips):
    """An expert that lies on two ranks is counted on both."""

    def norm(self, gradients):
        return super().norm([*gradients, gradients[2]])


class SumOfNorms(Clips):
    def norm(self, gradients):
        return torch.stack([g.norm() for g in gradients]).sum()


class NormInBfloat16(Clips):
    def norm(self, gradients):
        return torch.stack([g.bfloat16().norm() for g in gradients]).norm().float()


class ClipsEach(Clips):
    """Each tensor is clipped by its own norm."""

    def clip_grad_norm(self, gradients, max_norm):
        parts = [super(ClipsEach, self).clip_grad_norm([g], max_norm) for g in gradients]
        return Clipped([part.gradients[0] for part in parts], self.norm([g.float() for g in gradients]))


class ClipsAlways(Clips):
    """Gradients below the limit are scaled up to it."""

    def factor(self, norm, max_norm):
        return max_norm / (norm + CLIP_EPSILON)


class ClipsWithoutEpsilon(Clips):
    def factor(self, norm, max_norm):
        return (max_norm / norm).clamp(max=1.0)


class SkipsNan(Clips):
    def norm(self, gradients):
        return super().norm([g.nan_to_num(0.0, 0.0, 0.0) for g in gradients])


class MeanOfMeans(Honest):
    """Every micro-batch counts the same, however many tokens it has."""

    def accumulate_gradients(self, parts, tokens):
        return super().accumulate_gradients(parts, [1] * len(tokens))


class SumsInTheirDtype(Honest):
    """Accumulates in the gradients' dtype, as .grad of a bfloat16 parameter does."""

    def accumulate_gradients(self, parts, tokens):
        return [
            sum((g * (n / sum(tokens)) for n, g in zip(tokens, some, strict=True)), torch.zeros_like(some[0])).float()
            for some in zip(*parts, strict=True)
        ]


class LosesTheLast(Honest):
    """The last micro-batch is left out where it is smaller than the first."""

    def accumulate_gradients(self, parts, tokens):
        kept = [
            g if n >= tokens[0] or i < len(tokens) - 1 else [torch.zeros_like(t) for t in g]
            for i, (g, n) in enumerate(zip(parts, tokens, strict=True))
        ]
        return super().accumulate_gradients(kept, tokens)


CAUGHT_BY = {
    CoupledDecay: "optimizer.adamw",
    DecoupledDecay: "optimizer.adam",
    DecayWithoutRate: "optimizer.adamw",
    DecayAfterStep: "optimizer.adamw",
    EpsilonInsideTheRoot: "optimizer.adamw",
    EpsilonBeforeCorrection: "optimizer.adamw_no_decay",
    NoEpsilonWorthMentioning: "optimizer.adamw",
    NoCorrection: "optimizer.adamw",
    NoCorrectionAfterTheFirst: "optimizer.adamw",
    StepOffByOne: "optimizer.adamw",
    MomentsInBfloat16: "optimizer.adamw",
    SecondMomentOfTheSum: "optimizer.adam",
    TruncatesParameters: "optimizer.adamw",
    StepsInBfloat16: "optimizer.adamw",
    ForgetsTheIdle: "optimizer.adamw",
    LosesTail: "optimizer.adamw",
    ReplacesNan: "optimizer.nonfinite",
    SpreadsNan: "optimizer.nonfinite",
    FusedAsItIs: "optimizer.strided",
    DampensTheFirst: "optimizer.sgd",
    IgnoresDampening: "optimizer.sgd",
    NesterovUnasked: "optimizer.sgd",
    RateInsideMomentum: "optimizer.sgd",
    TruncatesSGD: "optimizer.sgd_exact",
    NormWithoutExperts: "gradients.clip_above",
    NormWithoutTheLast: "gradients.clip_above",
    NormWithAnExpertTwice: "gradients.clip_above",
    SumOfNorms: "gradients.clip_above",
    NormInBfloat16: "gradients.clip_above",
    ClipsEach: "gradients.clip_above",
    ClipsAlways: "gradients.clip_below",
    ClipsWithoutEpsilon: "gradients.clip_small",
    SkipsNan: "gradients.clip_nan",
    MeanOfMeans: "gradients.micro_batches",
    SumsInTheirDtype: "gradients.accumulate",
    LosesTheLast: "gradients.accumulate",
}


@pytest.mark.parametrize("wrong", CAUGHT_BY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_wrong_implementation_is_caught_by_the_case_that_is_meant_for_it(wrong, seed):
    found = verdicts(wrong(), seed, [CASES[CAUGHT_BY[wrong]]])
    assert any(verdict.status.colour == "red" for verdict in found.values()), found


def test_a_step_that_is_a_thousandth_too_long_is_caught_and_the_parameter_is_named():
    class TooLong(Written):
        def update(self, m, v, t, h):
            return super().update(m, v, t, h) * 1.001

    verdict = judge(CASES["optimizer.adamw"], TooLong(), "float32")
    assert verdict.status is Status.FAIL_NUMERIC
    assert "parameter of dense" in verdict.detail
    assert "moment" not in verdict.detail, "the moments are right, and judged on their own"


def test_an_error_of_the_moments_does_not_count_against_the_parameters():
    verdict = judge(CASES["optimizer.adamw"], MomentsInBfloat16(), "bfloat16")
    assert "moment of" in verdict.detail
    assert "parameter of" not in verdict.detail


def test_a_contract_that_saturates_promises_nothing_of_infinite_gradients():
    from hal_conformance.case import Unpromised

    for name in ("optimizer.nonfinite", "gradients.clip_nan", "gradients.clip_infinite"):
        with pytest.raises(Unpromised, match="infinities"):
            judge(CASES[name], Honest(), "float32", contract=Contract(nonfinite="saturate"))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_hostile_outputs_get_a_red_verdict_and_never_raise(case):
    params = Params(case.presets()[0], case.dtypes()[0], "tiny", 0)
    inputs = case.inputs(params)
    good = case.run(Honest(), {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    good = {name: codec.from_torch(tensor) for name, tensor in good.items()}
    for name, array in good.items():
        nan = np.full_like(array, np.nan if case.name != "gradients.clip_nan" else 1.0)
        for bad in (None, array[None], array.astype(np.complex64), nan):
            outputs = {k: v for k, v in good.items() if k != name} | ({} if bad is None else {name: bad})
            with np.errstate(all="ignore"):
                assert case.judge(inputs, outputs, params, Contract()).status.colour == "red", (name, bad)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_inputs_are_a_pure_function_of_their_parameters_and_do_not_change_in_a_run(case):
    params = Params(case.presets()[0], case.dtypes()[-1], "tiny", 5)
    first, second = case.inputs(params), case.inputs(params)
    tensors = {name: codec.to_torch(array, CPU) for name, array in second.items()}
    case.run(Honest(), tensors, params)
    assert {k: v.tobytes() for k, v in first.items()} == {k: codec.from_torch(v).tobytes() for k, v in tensors.items()}
    other = case.inputs(Params(params.preset, params.dtype, "tiny", 6))
    if case.name != "gradients.clip_zero":
        assert any(first[k].tobytes() != other[k].tobytes() for k in first), "the seed does nothing"


def test_the_idle_expert_and_tiny_gradients_are_among_the_inputs():
    params = Params("ling-lite", "float32", "tiny", 0)
    arrays = optimizer.ADAMW.inputs(params)
    assert not arrays["g/expert2"].any()
    sizes = np.abs(arrays["g/dense"])
    assert ((sizes > 0) & (sizes < 1e-12)).any()
    assert (sizes == 0).any()
    assert np.abs(arrays["g/expert0"]).max() > 20 * sizes.max()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    beta1=st.floats(0.5, 0.99),
    beta2=st.floats(0.8, 0.9999),
    power=st.integers(-40, 10),
    step=st.integers(1, 2000),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    single=st.booleans(),
    form=st.sampled_from([Written, Interpolates, Apex, Wide, Loops]),
)
def test_no_form_of_adamw_leaves_its_bound(seed, beta1, beta2, power, step, decay, single, form):
    hyper = AdamHyper(2.0**-7, beta1, beta2, 1e-8, decay)
    arrays = [make.normal(seed, name, 64).astype(np.float32) for name in "pgmv"]
    p, g, m, v = arrays[0], arrays[1] * np.float32(2.0**power), arrays[2], arrays[3] ** 2
    tensors = [[torch.from_numpy(a)] for a in (p, g, m, v)]
    made = form().adamw_step(*tensors, step, hyper)
    got_p, got_m, got_v = (some[0].numpy().astype(np.float64) for some in made)
    was_p, was_m, was_v, effective = (Bounded.exact(a) for a in (p, m, v, g))
    margins = []
    for reading in oracle_adam.READINGS:
        first, second = reading.betas(hyper)
        parameter = oracle_adam.parameter(
            was_p, oracle_adam.unstored(got_m), oracle_adam.unstored(got_v), step, hyper, "float32",
            decoupled=True, single=reading.single_corrections,
        )  # fmt: skip
        bounds = (
            oracle_adam.first_moment(was_m, effective, first),
            oracle_adam.second_moment(was_v, effective, second),
            parameter,
        )
        margins.append(
            [
                float((np.abs(got - b.value) / b.bound).max())
                for got, b in zip((got_m, got_v, got_p), bounds, strict=True)
            ]
        )
    assert max(min(column) for column in zip(*margins, strict=True)) <= 1.0
    del single


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 6), scale=st.integers(-30, 30), ratio=st.floats(0.01, 3))
def test_no_order_of_summation_leaves_the_bound_of_the_norm(seed, parts, scale, ratio):
    sizes = make.integers(seed, "sizes", 1, 200, parts)
    gradients = [(make.normal(seed, f"g{i}", int(n)) * 2.0**scale).astype(np.float32) for i, n in enumerate(sizes)]
    total = np.float32(0)
    flat = np.concatenate(gradients)
    for square in (flat * flat)[make.permutation(seed, "order", len(flat))]:
        total = np.float32(total + square)
    norm = np.float32(np.sqrt(total))
    limit = float(norm) * ratio + 1e-30
    factor = min(np.float32(1), np.float32(np.float32(limit) / np.float32(norm + np.float32(CLIP_EPSILON))))
    expected, clipped = clip_grad_norm([g.astype(np.float64) for g in gradients], limit, "float32")
    assert abs(float(norm) - expected.value) <= expected.bound
    for g, bounded in zip(gradients, clipped, strict=True):
        assert (np.abs((g * factor).astype(np.float64) - bounded.value) <= bounded.bound).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.lists(st.integers(0, 500), min_size=1, max_size=9).filter(sum))
def test_the_sum_over_micro_batches_is_the_whole_batch(seed, tokens):
    parts = [make.normal(seed, f"part{i}", 40).astype(np.float32) for i in range(len(tokens))]
    expected = accumulate([part.astype(np.float64) for part in parts], tokens).stored("float32")
    for ops in (Honest(), Sequential()):
        (got,) = ops.accumulate_gradients([[torch.from_numpy(part)] for part in parts], tokens)
        assert (np.abs(got.numpy() - expected.value) <= expected.bound).all()


def test_what_does_not_fit_together_is_refused():
    ops, one, two = TorchOptimizerOps(), [torch.zeros(3)], [torch.zeros(4)]
    with pytest.raises(ShapeError, match="step is 0"):
        ops.adamw_step(one, one, one, one, 0, AdamHyper(0.1))
    with pytest.raises(ShapeError, match="expected: the same"):
        ops.sgd_step(one, two, one, 1, SGDHyper(0.1))
    for parts, tokens in (([], []), ([one], []), ([one], [0])):
        with pytest.raises(ShapeError, match="token counts"):
            ops.accumulate_gradients(parts, tokens)


def test_the_portable_implementation_is_torchs_own_optimiser():
    p, g = torch.randn(7, generator=torch.Generator().manual_seed(0)), torch.ones(7)
    theirs = torch.nn.Parameter(p.clone())
    optimiser = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    ours, m, v = [p], [torch.zeros(7)], [torch.zeros(7)]
    for step in (1, 2, 3):
        theirs.grad = g * step
        optimiser.step()
        ours, m, v = TorchOptimizerOps().adamw_step(ours, [g * step], m, v, step, AdamHyper(0.1, 0.8, 0.9, 1e-6, 0.2))
    assert torch.equal(ours[0], theirs.detach())
    # SGD without momentum keeps what its momentum would have been.
    made = TorchOptimizerOps().sgd_step([p], [g], [torch.zeros(7)], 1, SGDHyper(0.5, weight_decay=2.0))
    assert torch.equal(made.momentum[0], g + 2.0 * p)
