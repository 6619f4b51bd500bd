# SPDX-License-Identifier: Apache-2.0
"""Operators that return something else than their protocol says: named, and not a crash."""

import pytest
import torch

from hal.moe.torch_ops import torch_ops
from hal_conformance import arrays as codec
from hal_conformance.case import Malformed, Params
from hal_conformance.cases import by_name
from hal_conformance.cases.base import observed


class PlainTuples:
    """The portable operators, whose results have lost their names."""

    def route(self, *given, **named):
        return tuple(torch_ops.route(*given, **named))

    def dispatch(self, *given, **named):
        return tuple(torch_ops.dispatch(*given, **named))

    def layer(self, *given, **named):
        return tuple(torch_ops.layer(*given, **named))


class PlainRouting(PlainTuples):
    """A layer with names, whose routing has none."""

    def layer(self, *given, **named):
        out = torch_ops.layer(*given, **named)
        return out._replace(routing=tuple(out.routing))


@pytest.mark.parametrize(
    ("case", "ops", "words"),
    [
        ("router.logits", PlainTuples(), "a tuple came back, which has no logits_TE, .*: not a Routing"),
        ("router.backward", PlainTuples(), "not a Routing"),
        ("dispatch.permutation", PlainTuples(), "not a Dispatch"),
        ("dispatch.backward", PlainTuples(), "not a Dispatch"),
        ("layer.forward_free", PlainTuples(), "not a LayerOutput"),
        ("layer.backward_free", PlainRouting(), "not a Routing"),
    ],
)
def test_a_result_without_its_fields_is_named(case, ops, words):
    params = Params("ling-lite", "float32", "tiny", 0)
    inputs = by_name(case).inputs(params)
    tensors = {name: codec.to_torch(array, torch.device("cpu")) for name, array in inputs.items()}
    with pytest.raises(Malformed, match=words):
        by_name(case).run(ops, tensors, params)


class OtherShapes:
    """The portable operators, with results of another shape, another type or on another device."""

    def z_loss(self, logits):
        return torch_ops.z_loss(logits)[None]

    def aux_loss(self, *given):
        return torch_ops.aux_loss(*given).item()

    def experts(self, *given):
        return torch_ops.experts(*given)[:-1]

    def combine(self, *given, **named):
        return torch_ops.combine(*given, **named).to("meta")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("losses.z", r"a tensor of shape \[1\] came back, expected \[\]"),
        ("losses.aux", "a float came back, not a tensor"),
        ("experts.backward", r"a tensor of shape \[\d+, \d+\] came back, expected \[\d+, \d+\]"),
        ("combine.backward", "a tensor on meta came back, expected cpu"),
    ],
)
def test_what_cannot_go_backward_is_named_and_is_no_crash(case, words):
    params = Params("mixtral-8x7b", "float32", "tiny", 0)
    inputs = by_name(case).inputs(params)
    tensors = {name: codec.to_torch(array, torch.device("cpu")) for name, array in inputs.items()}
    with pytest.raises(Malformed, match=words):
        by_name(case).run(OtherShapes(), tensors, params)


@pytest.mark.parametrize("made", [[torch.ones(2)], torch.ones(2).numpy(), "y"])
def test_what_is_no_tensor_is_named_where_nothing_goes_backward(made):
    with pytest.raises(Malformed, match=r"y_TD is a (list|ndarray|str), not a tensor"):
        observed({"there": torch.ones(2), "none": None, "y_TD": made})
