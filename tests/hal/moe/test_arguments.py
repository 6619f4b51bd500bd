# SPDX-License-Identifier: Apache-2.0
"""What goes into the operators: dtypes, devices and counts are right or refused in one way, by every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hal.errors import ShapeError
from hal.moe import ExpertWeights, LayerWeights, MoEModelSpec, RouterSpec, SharedWeights
from hal.moe.checks import FLOATING_DTYPES, INDEX_DTYPES
from hal.moe.torch_ops import TorchMoEOps, torch_ops

SPEC = RouterSpec(num_experts=4, top_k=2)
BIASED = RouterSpec(num_experts=4, top_k=2, score="sigmoid", selection_bias=True)
MODEL = MoEModelSpec("tiny", SPEC, 1, 8, 8, 1, 8, True, None, None, source="made for a test")
CHOSEN = torch.tensor([[0, 1], [2, 3], [1, 0]])


def _weights(**changed: Tensor) -> ExpertWeights:
    return ExpertWeights(**{name: torch.ones(4, 8, 8) for name in ("w1_EFD", "w3_EFD", "w2_EDF")} | changed)


def _layer(**changed: Any) -> Tensor:
    shared = {"w1_SD": torch.ones(8, 8), "w3_SD": torch.ones(8, 8), "w2_DS": torch.ones(8, 8)}
    parts = {"gate_ED": torch.ones(4, 8), "shared_gate_D": torch.ones(8)}
    shared |= {name: value for name, value in changed.items() if name in shared}
    parts |= {name: value for name, value in changed.items() if name in parts}
    weights = LayerWeights(parts["gate_ED"], None, _weights(), SharedWeights(*shared.values()), parts["shared_gate_D"])
    return torch_ops.layer(torch.ones(3, 8), weights, MODEL).y_TD


# Every operator with every floating-point tensor that it takes, and a right one in its place.
FLOATING: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "route x": (lambda t: torch_ops.route(t, torch.ones(4, 8), SPEC), torch.ones(3, 8)),
    "route gate": (lambda t: torch_ops.route(torch.ones(3, 8), t, SPEC), torch.ones(4, 8)),
    "route bias": (lambda t: torch_ops.route(torch.ones(3, 8), torch.ones(4, 8), BIASED, t), torch.ones(4)),
    "dispatch x": (lambda t: torch_ops.dispatch(t, CHOSEN, 4), torch.ones(3, 8)),
    "combine y": (lambda t: torch_ops.combine(t, torch.ones(3, 2), torch.arange(6), 3), torch.ones(6, 8)),
    "combine weights": (lambda t: torch_ops.combine(torch.ones(6, 8), t, torch.arange(6), 3), torch.ones(3, 2)),
    "experts x": (
        lambda t: torch_ops.experts(t, torch.tensor([3, 0, 0, 0]), ExpertWeights(*(w.to(t.dtype) for w in _weights()))),
        torch.ones(3, 8),
    ),
    "aux_loss scores": (lambda t: torch_ops.aux_loss(t, CHOSEN, SPEC), torch.full((3, 4), 0.25)),
    "z_loss logits": (lambda t: torch_ops.z_loss(t), torch.ones(3, 4)),
}

# The same for indices and counts.
INDICES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "route experts": (lambda t: torch_ops.route(torch.ones(3, 8), torch.ones(4, 8), SPEC, experts_TK=t), CHOSEN),
    "dispatch experts": (lambda t: torch_ops.dispatch(torch.ones(3, 8), t, 4), CHOSEN),
    "combine slots": (lambda t: torch_ops.combine(torch.ones(6, 8), torch.ones(3, 2), t, 3), torch.arange(6)),
    "experts counts": (lambda t: torch_ops.experts(torch.ones(3, 8), t, _weights()), torch.tensor([3, 0, 0, 0])),
    "aux_loss experts": (lambda t: torch_ops.aux_loss(torch.full((3, 4), 0.25), t, SPEC), CHOSEN),
}

OTHER_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.bool]
OTHER_INTEGERS = [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float32, torch.complex64]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@pytest.mark.parametrize("dtype", OTHER_FLOATS, ids=str)
@pytest.mark.parametrize("case", FLOATING)
def test_a_floating_point_dtype_that_is_not_computed_in_is_refused_with_those_that_are(
    case: str, dtype: torch.dtype
) -> None:
    call, tensor = FLOATING[case]
    with pytest.raises(ShapeError, match=_names(FLOATING_DTYPES)):
        call(tensor.to(dtype))


@pytest.mark.parametrize("dtype", OTHER_INTEGERS, ids=str)
@pytest.mark.parametrize("case", INDICES)
def test_an_index_of_another_dtype_is_refused_with_those_that_are_taken(case: str, dtype: torch.dtype) -> None:
    call, tensor = INDICES[case]
    with pytest.raises(ShapeError, match=_names(INDEX_DTYPES)):
        call(tensor.to(dtype))


@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("case", FLOATING)
def test_every_other_floating_point_dtype_is_taken(case: str, dtype: torch.dtype) -> None:
    call, tensor = FLOATING[case]
    call(tensor.to(dtype))


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("case", INDICES)
def test_every_index_dtype_gives_what_int64_gives(case: str, dtype: torch.dtype) -> None:
    call, tensor = INDICES[case]
    got, want = call(tensor.to(dtype)), call(tensor)
    for a, b in zip(*((r,) if isinstance(r, Tensor) else tuple(r) for r in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_256_experts_chosen_in_a_narrow_dtype_are_256_experts(dtype: torch.dtype) -> None:
    spec = RouterSpec(num_experts=256, top_k=2)
    experts_TK = torch.tensor([[0, 255], [255, 254], [7, 255]])
    scores_TE = torch.rand(3, 256, generator=torch.Generator().manual_seed(0)).softmax(-1)
    want = torch_ops.aux_loss(scores_TE, experts_TK, spec)
    assert torch.equal(torch_ops.aux_loss(scores_TE, experts_TK.to(dtype), spec), want)
    counts_E = torch_ops.dispatch(torch.ones(3, 8), experts_TK.to(dtype), 256).counts_E
    assert counts_E.tolist() == [(experts_TK == e).sum().item() for e in range(256)]


def test_128_experts_chosen_in_int8_are_128_experts_and_the_129th_is_out_of_range() -> None:
    experts_TK = torch.tensor([[127], [0]], dtype=torch.int8)
    assert torch_ops.dispatch(torch.ones(2, 8), experts_TK, 128).counts_E[127] == 1
    with pytest.raises(ShapeError, match="from 0 to 127"):
        torch_ops.dispatch(torch.ones(2, 8), experts_TK, 127)
    with pytest.raises(ShapeError, match="from -1 to 0"):
        torch_ops.dispatch(torch.ones(2, 8), torch.tensor([[-1], [0]], dtype=torch.int8), 255)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda call=call, t=t: call(t.to("meta")) for case, (call, t) in FLOATING.items() if case != "z_loss logits"),
        *(lambda call=call, t=t: call(t.to("meta")) for call, t in INDICES.values()),
        lambda: torch_ops.experts(
            torch.ones(3, 8), torch.tensor([3, 0, 0, 0]), _weights(w3_EFD=torch.ones(4, 8, 8, device="meta"))
        ),
        *(
            lambda name=name, shape=shape: _layer(**{name: torch.ones(shape, device="meta")})
            for name, shape in (("gate_ED", (4, 8)), ("w2_DS", (8, 8)), ("shared_gate_D", (8,)))
        ),
    ],
)
def test_tensors_on_two_devices_are_refused_with_both(call: Callable[[], Any]) -> None:
    with pytest.raises(ShapeError, match=r"(?s)lies on (cpu|meta).*on (cpu|meta)"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch_ops.route([[1.0]], torch.ones(4, 1), SPEC),
        lambda: torch_ops.dispatch(torch.ones(3, 8), None, 4),
        lambda: torch_ops.z_loss(1.0),
    ],
)
def test_what_is_no_tensor_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ShapeError, match="expected: a tensor"):
        call()


@pytest.mark.parametrize("bad", [1.5, 2.0, True, "2", None, -1])
def test_numbers_of_experts_tokens_and_rows_are_integers(bad: Any) -> None:
    with pytest.raises(ShapeError, match="num_experts"):
        torch_ops.dispatch(torch.ones(3, 8), CHOSEN, bad)
    with pytest.raises(ShapeError, match="num_tokens"):
        torch_ops.combine(torch.ones(6, 8), torch.ones(3, 2), torch.arange(6), bad)
    if bad is not None:
        with pytest.raises(ShapeError, match="capacity"):
            torch_ops.dispatch(torch.ones(3, 8), CHOSEN, 4, capacity=bad)


def test_a_size_that_torch_traces_as_a_symbol_is_an_integer_too() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    ops = TorchMoEOps(check_indices=False)

    def through(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        sent = ops.dispatch(x_TD, experts_TK, 4)
        return ops.combine(sent.x_RD, weights_TK, sent.slot_R, x_TD.shape[0])

    traced = make_fx(through, tracing_mode="symbolic")(torch.ones(5, 8), torch.zeros(5, 2).long(), torch.ones(5, 2))
    arguments = torch.ones(3, 8), CHOSEN, torch.rand(3, 2)
    assert torch.equal(traced(*arguments), through(*arguments))
