# SPDX-License-Identifier: Apache-2.0
"""Cases around other cases: numbers of tokens around tiles, results that are read late, and verdicts put together."""

import numpy as np
import pytest
import torch
from in_process import CPU, judge

from hal.contract import Contract
from hal.errors import UnsupportedOperation
from hal.moe.torch_ops import TorchMoEOps
from hal.moe.torch_training_ops import TorchTrainingOps
from hal_conformance import arrays as codec
from hal_conformance.case import Malformed, Params
from hal_conformance.cases import by_name, frozen, kept_results, tails, untrained
from hal_conformance.cases.norm import LAYER, RMS
from hal_conformance.numerics.detectors import joined
from hal_conformance.verdicts import Judgement, Status

TAILS = tails.Tails("norm.tails", RMS)
KEPT = kept_results.KeptResults("norm.kept", RMS)
UNTRAINED = untrained.Untrained("norm.untrained", RMS, ("y_TD",))


class OneRowOff(TorchTrainingOps):
    """The last row is off for one number of tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def rms_norm(self, x_TD, weight_D, eps):
        y = super().rms_norm(x_TD, weight_D, eps)
        return torch.cat((y[:-1], y[-1:] * 1.01)) if len(y) == self.tokens else y


@pytest.mark.parametrize("scale", tails.AROUND_TILES)
def test_each_number_of_tokens_is_seen_and_named(scale):
    p = Params("ling-lite", "float32", scale)
    for tokens in tails.AROUND_TILES[scale] if scale != "full" else ():
        found = judge(TAILS, OneRowOff(tokens), p)
        assert found.status is Status.FAIL_NUMERIC
        assert found.detail.startswith(f"{tokens} tokens: "), found.detail
    assert judge(TAILS, OneRowOff(1000), Params("ling-lite", "float32", "tiny")).status.colour == "green"


def test_a_missing_output_of_one_number_of_tokens_is_named():
    p = Params("ling-lite", "float32", "tiny")
    inputs = TAILS.inputs(p)
    outputs = TAILS.run(TorchTrainingOps(), {n: codec.to_torch(a, CPU) for n, a in inputs.items()}, p)
    arrays = {name: codec.from_torch(tensor) for name, tensor in outputs.items()}
    del arrays["65/dx_TD"]
    found = TAILS.judge(inputs, arrays, p, Contract())
    assert found.status is Status.FAIL_STRUCTURE
    assert found.detail == "65 tokens: there is no output 'dx_TD'"


class OffWhere(TorchTrainingOps):
    """The result is off where a condition holds of x."""

    def __init__(self, where):
        self.where = where

    def rms_norm(self, x_TD, weight_D, eps):
        y = super().rms_norm(x_TD, weight_D, eps)
        return y * 1.01 if self.where(x_TD) else y


@pytest.mark.parametrize(
    ("where", "seen"),
    [
        (lambda x: not torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "no_grad"),
        (lambda x: torch.is_inference_mode_enabled(), "inference_mode"),
        (lambda x: torch.is_grad_enabled() and not x.requires_grad, "frozen"),
    ],
)
def test_each_way_in_which_nothing_is_trained_is_seen_and_named(where, seen):
    p = Params("ling-lite", "float32", "tiny")
    found = judge(UNTRAINED, OffWhere(where), p)
    assert found.status is Status.FAIL_NUMERIC
    assert [mode for mode in untrained.MODES if f"{mode}: " in found.detail] == [seen]
    assert judge(UNTRAINED, TorchTrainingOps(), p).status.colour == "green"


class OneBuffer(TorchTrainingOps):
    """The result lies in one buffer; or a gradient does."""

    def __init__(self, of):
        self.of, self.buffers = of, {}

    def buffered(self, tensor):
        return self.buffers.setdefault(tensor.shape, torch.empty_like(tensor)).copy_(tensor)

    def rms_norm(self, x_TD, weight_D, eps):
        y = super().rms_norm(x_TD, weight_D, eps)
        if self.of == "result":
            y.data = self.buffered(y.detach())
        else:
            x_TD.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", self.buffered(x.grad)))
        return y


@pytest.mark.parametrize("of", ["result", "gradient"])
def test_what_the_next_call_overwrites_is_red_and_nothing_else(of):
    p = Params("ling-lite", "float32", "tiny", 2**32 - 1)  # of which there is no next seed
    assert judge(KEPT, OneBuffer(of), p).status is Status.FAIL_NUMERIC
    assert judge(RMS, OneBuffer(of), p).status.colour == "green"
    assert judge(KEPT, TorchTrainingOps(), p).status.colour == "green"


def test_both_seeds_have_inputs_of_the_same_shapes():
    inputs = KEPT.inputs(Params("ling-lite", "bfloat16", "tiny", 7))
    first = {name for name in inputs if not name.startswith(kept_results.OWN)}
    assert {f"{kept_results.OWN}/{name}" for name in first} == set(inputs) - first
    for name in first:
        own = inputs[f"{kept_results.OWN}/{name}"]
        assert own.shape == inputs[name].shape
        assert not np.array_equal(own, inputs[name])


class Calls(TorchTrainingOps):
    """Notes which rows each call and each backward pass is of, and is off by one percent in one of the calls."""

    def __init__(self, off=None):
        self.order, self.calls, self.off = [], 0, off

    def rms_norm(self, x_TD, weight_D, eps):
        number, self.calls = self.calls, self.calls + 1
        self.order.append(("forward", x_TD.data_ptr(), float(x_TD.detach().sum()), weight_D))
        y = super().rms_norm(x_TD, weight_D, eps)
        y.register_hook(lambda _: self.order.append(("backward", number)))
        return y * 1.01 if number == self.off else y


def test_the_other_seeds_backward_pass_lies_between_those_of_two_calls_and_its_tensors_are_used_again():
    p, ops = Params("ling-lite", "float32", "tiny"), Calls()
    assert judge(KEPT, ops, p).status.colour == "green"
    calls = [entry for entry in ops.order if entry[0] == "forward"]
    assert [entry[:2] if entry[0] == "backward" else entry[0] for entry in ops.order] == [
        "forward", ("backward", 0), "forward", "forward", "forward", ("backward", 3), ("backward", 1), ("backward", 2),
        "forward", ("backward", 4),
    ]  # fmt: skip
    assert [where for _, where, _, _ in calls] == [calls[i][1] for i in (0, 1, 0, 0, 1)]
    assert [total for _, _, total, _ in calls] == [calls[i][2] for i in (0, 1, 0, 0, 0)]
    assert calls[0][1:3] != calls[1][1:3]
    assert calls[4][3] is calls[1][3]  # the Parameter, of other values
    assert len({id(weight) for *_, weight in calls}) == 4


@pytest.mark.parametrize(
    ("off", "said"), [(0, "run 1: y"), (1, "y"), (2, "run 3: y"), (3, "run 2: y"), (4, "run 4: y")]
)
def test_each_of_the_calls_is_judged(off, said):
    found = judge(KEPT, Calls(off), Params("ling-lite", "float32", "tiny"))
    assert found.status is Status.FAIL_NUMERIC
    assert found.detail.startswith(said)


FROZEN = frozen.Frozen("norm.frozen", LAYER)


class InPass(TorchTrainingOps):
    """Does something else where the weight alone is trained."""

    def __init__(self, change):
        self.change = change

    def layer_norm(self, x_TD, weight_D, bias_D, eps):
        y = super().layer_norm(x_TD, weight_D, bias_D, eps)
        return self.change(y) if weight_D.requires_grad and not x_TD.requires_grad else y


def test_each_input_is_trained_alone_and_frozen_alone_and_each_pass_is_judged():
    p = Params("ling-lite", "float32", "tiny")
    assert FROZEN.passes(("x_TD", "weight_D", "bias_D")) == [
        ("x_TD",), ("weight_D",), ("bias_D",), ("weight_D", "bias_D"), ("x_TD", "bias_D"), ("x_TD", "weight_D"),
    ]  # fmt: skip
    assert FROZEN.passes(("x_TD", "weight_D")) == [("x_TD",), ("weight_D",)]
    assert judge(FROZEN, TorchTrainingOps(), p).status.colour == "green"
    assert judge(FROZEN, InPass(lambda y: y), p).status.colour == "green"
    other_bits = judge(FROZEN, InPass(lambda y: y * (1 + 2.0**-24 * 1.5)), p)
    assert other_bits.status.colour == "green"
    off = judge(FROZEN, InPass(lambda y: y * 1.01), p)
    assert off.status is Status.FAIL_NUMERIC
    assert off.detail.startswith("pass 2: y")
    lost = judge(FROZEN, InPass(lambda y: y.detach() + 0 * y), p)
    assert lost.status is Status.FAIL_NUMERIC
    assert "dweight" in lost.detail
    assert other_bits.detectors["rms"] is not None  # whole arrays have their statistics, whosever pass it is
    with pytest.raises(Malformed, match="requires no gradient"):
        judge(FROZEN, InPass(lambda y: y.detach()), p)


@pytest.mark.parametrize("without", [lambda x: x.detach(), lambda x: x.detach() + 0 * x])
def test_a_gradient_that_other_passes_have_is_missed_in_its_own(without):
    class NoTokens(TorchTrainingOps):
        def layer_norm(self, x_TD, weight_D, bias_D, eps):
            alone = weight_D.requires_grad and not bias_D.requires_grad
            return super().layer_norm(without(x_TD) if alone else x_TD, weight_D, bias_D, eps)

    found = judge(FROZEN, NoTokens(), Params("ling-lite", "float32", "tiny"))
    assert found.status.colour == "red"
    assert "dx" in found.detail


def test_both_calls_of_a_pass_that_adds_to_a_gradient_are_judged():
    case, p = by_name("experts.frozen"), Params("ling-lite", "float32", "tiny")

    class Off(TorchMoEOps):
        def __init__(self, number):
            super().__init__()
            self.number, self.calls = number, 0

        def experts(self, x_RD, counts_E, weights):
            self.calls += 1
            y = super().experts(x_RD, counts_E, weights)
            return y + 1 if self.calls == self.number else y

    for number, said in ((1, "first results: y"), (2, "first call of pass 2: y"), (3, "pass 2: y")):
        found = judge(case, Off(number), p)
        assert found.status.colour == "red"
        assert said in found.detail, found.detail


def test_a_gradient_that_is_not_asked_for_and_one_that_is_missing_are_no_results():
    case, p = by_name("router.frozen"), Params("ling-lite", "float32", "tiny")

    class NoScores(TorchMoEOps):
        def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
            routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
            return routing._replace(scores_TE=routing.scores_TE[:, :-1] if gate_ED.requires_grad else routing.scores_TE)

    with pytest.raises(Malformed, match="scores_TE: a tensor of shape"):
        judge(case, NoScores(), p)

    class Unasked(TorchMoEOps):
        def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
            gate_ED.grad = torch.ones_like(gate_ED)
            return super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)

    found = judge(case, Unasked(), p)
    assert (found.status, found.detail) == (Status.FAIL_STRUCTURE, "frozen, and has a gradient: dgate_ED")


def test_a_second_pass_over_a_graph_that_is_kept_counts_and_a_third_of_zeros():
    class Passes:
        def __init__(self, factors):
            self.factors = iter(factors)

        def z_loss(self, logits_TE):
            loss = TorchMoEOps().z_loss(logits_TE)
            loss.register_hook(lambda d: d * next(self.factors))
            return loss

    p = Params("mixtral-8x7b", "float32", "tiny")
    case = by_name("losses.z_kept_graph")
    assert judge(case, Passes((1, 1, 1)), p).status.colour == "green"
    for factors, word in (((1, 0, 1), "second pass"), ((1, 1, float("nan")), "pass of zeros")):
        found = judge(case, Passes(factors), p)
        assert found.status.colour == "red"
        assert found.detail.startswith(word)


@pytest.mark.parametrize(("words", "error"), [("non-empty donated buffers", UnsupportedOperation), ("x", RuntimeError)])
def test_what_keeps_no_graph_and_says_so_is_unsupported_if_it_was_compiled(words, error):
    class Refuses:
        def z_loss(self, logits_TE):
            loss = TorchMoEOps().z_loss(logits_TE)

            def refuse(d):
                raise RuntimeError(words)

            loss.register_hook(refuse)
            return loss

    with pytest.raises(error):
        judge(by_name("losses.z_kept_graph"), Refuses(), Params("mixtral-8x7b", "float32", "tiny"))


def test_vectors_are_spread_among_nan_and_matrices_lie_by_columns():
    seen = {}

    class Sees:
        def experts(self, x_RD, counts_E, weights):
            seen.update(x=x_RD, counts=counts_E)
            return TorchMoEOps().experts(x_RD, counts_E, weights)

    assert judge(by_name("experts.strided"), Sees(), Params("mixtral-8x7b", "float32", "tiny")).status.colour == "green"
    assert (seen["counts"].stride(), seen["x"].stride(0)) == ((2,), 1)


def test_judgements_are_joined_to_the_worst_with_the_largest_figures():
    of = {"bound": 0.5, "rms": None, "bias": -2.0, "exact": None}
    good = Judgement(Status.PASS, 0.5, of, "fine")
    bad = Judgement(Status.FAIL_NUMERIC, 3.0, {"bound": 3.0, "rms": 1.5, "bias": 0.1, "exact": None}, "far away")
    found = joined({"first": good, "second": bad})
    assert (found.status, found.margin, found.detail) == (Status.FAIL_NUMERIC, 3.0, "second: far away")
    assert found.detectors == {"bound": 3.0, "rms": 1.5, "bias": -2.0, "exact": None}
    assert joined({}).status is Status.INVALID  # nothing was judged
