# SPDX-License-Identifier: Apache-2.0
"""The families norm, rotary, attention and head: no order of operations leaves the bounds, and bounds are not wide."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import CPU, judge

from hal.contract import Arithmetic
from hal.errors import ShapeError
from hal.moe.torch_training_ops import TorchTrainingOps, torch_training_ops
from hal_conformance import arrays as codec
from hal_conformance import inputs as make
from hal_conformance.case import DTYPES, Params
from hal_conformance.cases import attention, attention_sums, by_name, head, norm, rotary
from hal_conformance.faults import VARIATIONS
from hal_conformance.faults.attention import Composed
from hal_conformance.faults.benign_attention import AbsorbedLatent, BlockedAttention
from hal_conformance.faults.benign_head import FusedLoss
from hal_conformance.faults.benign_norm import BlockedNorms
from hal_conformance.faults.norm import NormGradientsInStorage
from hal_conformance.oracle.attention import attention_backward
from hal_conformance.oracle.cross_entropy import cross_entropy
from hal_conformance.oracle.norms import rms_norm

MEANT_FOR = {
    "normalises_otherwise_in256": "norm.rms_whole",
    "normalises_all_but_the_last_of_a_block": "norm.rms_many",
    "projects_a_grid_of_tokens": "head.norm_many_tokens",
    "averages_a_grid": "head.cross_entropy_many",
    "sums_all_but_a_block": "head.whole_vocabulary",
    "counts_ignored_targets_of_minus_one": "head.whole_vocabulary",
    "z_of_a_vocabulary_without_gradient": "head.large_vocabulary",
    "normaliser_in_storage": "attention.many_keys",
    "normaliser_rounded_once": "attention.many_keys",
    "nothing_is_rescaled": "attention.many_keys",
    "results_in_storage": "attention.many_keys",
    "keys_beyond_a_block": "attention.many_keys",
    "scale_from_the_width": "attention.many_keys",
    "scale_in_storage": "attention.many_keys",
    "cuts_wide_values": "attention.many_keys",
    "dot_in_storage": "attention.many_keys",
    "results_of_long_blocks_in_storage": "attention.cancels",
    "query_gradients_in_storage": "attention.cancels",
    "key_gradients_of_long_blocks_in_storage": "attention.cancels",
    "key_gradients_of_heads_in_storage": "attention.heads_cancel",
    "rescales_in_storage": "attention.rises",
    "one_buffer_of_attention": "attention.pick",
    "attends_no_whole_tiles": "attention.tiles",
    "key_gradients_in_storage": "attention.tiles",
    "one_query_from_the_start": "attention.one_query",
    "the_only_key_head_gets_a_mean": "attention.one_query",
    "hidden_keys_reach_gradients": "attention.hidden_backward",
    "takes_the_latent_for_dense": "attention.latent_strided",
    "rotated_logits_in_storage": "attention.latent_full",
    "heads_of64_are_scaled": "attention.heads_of_64",
    "channels_beyond192": "attention.heads_of_256",
    "skips_the_third_tile": "attention.three_tiles",
    "skips_the_third_large_tile": "attention.three_tiles",
    "does_not_train_the_last_tile": "attention.three_tiles",
    "trains_one_head_of_long_queries": "attention.three_tiles",
    "as_many_queries_as_keys": "attention.fewer_keys",
    "latent_channels_beyond256": "attention.latent_wide",
    "latent_channels_beyond512": "attention.latent_wide",
    "latent_heads_beyond_eight": "attention.latent_wide",
    "latent_heads_beyond_sixteen": "attention.latent_wide",
    "few_latent_queries_are_lost": "attention.latent_wide",
    "one_latent_query_is_lost": "attention.latent_one_query",
    "one_latent_query_of_service": "attention.latent_one_query_untrained",
    "latent_keys_beyond_a_block": "attention.latent_one_query",
    "does_not_train_the_long_latent": "attention.latent_one_query",
    "partial_table_in_storage": "rotary.many_positions",
    "positions_of_a_table": "rotary.many_positions",
    "rotates_heads_of_a_grid": "rotary.many_positions",
    "one_head_is_not_turned": "rotary.one_head",
    "one_token_is_not_turned": "rotary.one_token",
    "doubles_one_row": "norm.rms_one_token",
    "mean_of_one_block": "norm.rms_wide",
    "infinite_rows_are_finite": "norm.rms_infinite",
    "infinity_reaches_all_rows": "norm.layer_infinite",
    "head_keeps_its_weights": "head.norm_two_weights",
    "one_buffer_of_head": "head.norm_two_weights",
    "head_spreads_nan": "head.norm_nan",
    "stores_divided_tokens": "head.norm",
}
"""The case that is meant for a fault."""

CASES = (*norm.CASES, *rotary.CASES, *attention.CASES, *attention_sums.CASES, *head.CASES)
EXACT = ("_powers", ".cancels", ".heads_cancel", ".pick", ".quarter_turns", "no_tokens", ".none_count")


def verdicts(ops, cases, seed, scale="tiny"):
    return {
        (case.name, preset, dtype): judge(case, ops, Params(preset, dtype, scale, seed))
        for case in cases
        for preset in case.presets()
        for dtype in case.dtypes()
    }


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_portable_implementation_is_green_in_every_case(seed):
    found = verdicts(torch_training_ops, CASES, seed)
    assert len(found) > 100
    assert {key: v for key, v in found.items() if v.status.colour != "green"} == {}


@pytest.mark.parametrize("name", MEANT_FOR)
def test_a_fault_is_caught_by_the_case_that_is_meant_for_it(name):
    case = by_name(MEANT_FOR[name])
    for seed in (0, 1):
        found = verdicts(VARIATIONS[name].make(), [case], seed)
        assert "red" in {verdict.status.colour for verdict in found.values()}, found


def test_torchs_layer_norm_of_16_bit_tensors_adds_up_gradients_in_16_bits():
    """A finding: if this fails, torch has mended its CPU kernel, and `TorchTrainingOps.layer_norm` can use it."""
    found = verdicts(NormGradientsInStorage(), [norm.LAYER], 1)
    assert {key[2] for key, v in found.items() if v.status.colour == "red"} == {"bfloat16", "float16"}


def test_an_implementation_that_has_no_such_method_is_unsupported_not_wrong():
    assert {need for case in CASES for need in case.needs} == {
        name for name in vars(TorchTrainingOps) if not name.startswith("_")
    }


@given(seed=st.integers(0, 2**32 - 1), block=st.integers(1, 40), data=st.data())
def test_no_blocking_of_attention_exceeds_the_bound(seed, block, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    queries, more = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 20))
    causal, size = data.draw(st.booleans()), data.draw(st.sampled_from([0.3, 1.0, 6.0]))
    q = make.store(make.normal(seed, "q", queries, 4, 8) * size, dtype)
    k, v = (make.store(make.normal(seed, name, queries + more, 2, 8), dtype) for name in "kv")
    dy = make.store(make.normal(seed, "dy", queries, 4, 8), dtype)
    order = make.permutation(seed, "order", 8)  # of the inner dimension
    tensors = [
        codec.to_torch(array, CPU)
        for array in (np.ascontiguousarray(q[..., order]), np.ascontiguousarray(k[..., order]), v)
    ]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    ops = BlockedAttention()
    ops.block = block
    y = ops.attention(*leaves, 0.35, causal=causal)
    y.backward(codec.to_torch(dy, CPU))
    want = attention_backward(q, k, v, dy, 0.35, causal, dtype, Arithmetic())
    got = [codec.from_torch(t.detach()) for t in (y, *(leaf.grad for leaf in leaves))]
    back = np.argsort(order)
    got[1], got[2] = got[1][..., back], got[2][..., back]
    for array, chained in zip(got, (want.y, want.dq, want.dk, want.dv), strict=True):
        bounded = chained.within_deviations().stored(dtype)
        assert (np.abs(array.astype(np.float64) - bounded.value) <= bounded.bound).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 64),
    width=st.integers(1, 200),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_no_order_of_summation_exceeds_the_bound_of_a_norm(seed, block, width, size):
    x = make.store(make.activations(seed, "x", 4, width) * size, "float32")
    weight, dy = (
        make.store(make.normal(seed, name, *shape), "float32") for name, shape in (("w", (width,)), ("dy", (4, width)))
    )
    order = make.permutation(seed, "order", width)
    back = np.argsort(order)
    ops = BlockedNorms()
    ops.block = block
    leaves = [torch.from_numpy(np.ascontiguousarray(array[..., order])).requires_grad_() for array in (x, weight)]
    y = ops.rms_norm(*leaves, 1e-5)
    y.backward(torch.from_numpy(np.ascontiguousarray(dy[:, order])))
    want = rms_norm(x, weight, dy, 1e-5)
    for tensor, bounded in ((y.detach(), want.y), (leaves[0].grad, want.dx), (leaves[1].grad, want.dweight)):
        expected = bounded.stored("float32")
        assert (np.abs(tensor.numpy()[..., back] - expected.value) <= expected.bound).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(1, 300),
    size=st.sampled_from([0.1, 3.0, 100.0]),
    z=st.sampled_from([0.0, 1e-2]),
)
def test_no_order_of_summation_exceeds_the_bound_of_cross_entropy(seed, vocabulary, size, z):
    logits = make.store(make.normal(seed, "x", 6, vocabulary) * size, "float32")
    targets = make.integers(seed, "t", 0, vocabulary - 1, 6)
    targets[seed % 6] = -100
    order = make.permutation(seed, "order", vocabulary)
    x = torch.from_numpy(np.ascontiguousarray(logits[:, order])).requires_grad_()
    place = np.argsort(order)
    loss = FusedLoss().cross_entropy(
        x, torch.from_numpy(np.where(targets < 0, targets, place[targets.clip(0)])), z_coefficient=z
    )
    loss.backward()
    value, gradient = cross_entropy(logits, targets, -100, z)
    gradient = gradient.stored("float32")
    assert abs(float(loss.detach()) - value.value) <= value.bound
    assert (np.abs(x.grad.numpy()[:, place] - gradient.value) <= gradient.bound).all()


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.endswith(EXACT)], ids=lambda case: case.name)
def test_bounds_are_not_so_wide_that_nothing_is_caught(case):
    """The largest honest error of a run is within 30 times of the bound."""
    margins = [v.margin for v in verdicts(torch_training_ops, [case], 4).values() if v.margin is not None]
    assert max(margins) > 1 / 30


def test_the_head_can_be_taken_in_float64_and_its_gradient_is_that_of_the_equation():
    x, w = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 5, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, w: torch_training_ops.norm_head(x, w, train=True), (x, w))
    assert not torch_training_ops.norm_head(x, w, train=False).requires_grad


def test_attention_with_and_without_a_fused_kernel_agree_and_shapes_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(3, 4, 8, dtype=torch.float64),
        torch.randn(5, 2, 8, dtype=torch.float64),
        torch.randn(5, 2, 8, dtype=torch.float64),
    )
    for causal in (True, False):
        a = torch_training_ops.attention(q, k, v, 0.3, causal=causal)
        torch.testing.assert_close(a, Composed().attention(q, k, v, 0.3, causal=causal).double(), rtol=1e-5, atol=1e-5)
    for bad in ((q, k[:2], v[:2]), (q[:, :3], k, v), (q, k[..., :4], v), (q, k.float(), v)):
        with pytest.raises(ShapeError):
            torch_training_ops.attention(*bad, 0.3, causal=True)
    with pytest.raises(ShapeError):
        torch_training_ops.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ShapeError):
        torch_training_ops.rotary(torch.zeros(2, 1, 4), torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_what_latent_attention_projects_is_exact_in_storage_in_either_order(scale, dtype):
    case = next(case for case in attention.CASES if case.name == "attention.latent_backward")
    for seed in (0, 1, 2):
        given = {
            name: array.astype(np.float64)
            for name, array in case.inputs(Params("ling-lite", dtype, scale, seed)).items()
        }
        for equation, names in (
            ("sl,hdl->shd", ("latent_SL", "up_k_HdL")), ("sl,hel->she", ("latent_SL", "up_v_HeL")),
            ("thd,hdl->thl", ("q_THd", "up_k_HdL")), ("the,hel->thl", ("dy_THe", "up_v_HeL")),
        ):  # fmt: skip
            made = np.einsum(equation, *(given[name] for name in names))
            assert (make.store(made, dtype).astype(np.float64) == made).all()
            assert np.abs(made).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_absorbed_order_of_latent_attention_stays_within_the_bounds_of_its_gradients(dtype):
    cases = [case for case in attention.CASES if case.name.startswith("attention.latent_")]
    for seed in range(5):
        for case in cases:
            verdict = judge(case, AbsorbedLatent(), Params("ling-lite", dtype, "tiny", seed))
            assert verdict.status.colour == "green", verdict.detail
            assert verdict.margin > 1 / 30
