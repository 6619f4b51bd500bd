# SPDX-License-Identifier: Apache-2.0
"""Inputs are the same bits on every host, and look like what occurs in training."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hal_conformance import arrays as codec
from hal_conformance import inputs as make
from hal_conformance.cases import designs
from hal_conformance.kept import Kept
from hal_conformance.oracle.dispatching import spans


def test_the_bits_of_every_generator_are_fixed():
    """Recordings are compared by these hashes: a change here is a new version of the suite."""
    arrays = {
        "activations": make.store(make.activations(7, "x", 16, 300), "bfloat16"),
        "gate": make.store(make.gate(7, "g", 16, 64), "float32"),
        "weights": make.store(make.weights(7, "w", 4, 8, 16), "float16"),
        "choices": make.choices(7, "c", 32, 16, 4),
        "counts": make.sweep_counts(7, "n", 64, 200),
    }
    assert {name: codec.digest(array)[:12] for name, array in arrays.items()} == {
        "activations": "fd8cc0af3b17",
        "gate": "9ee23b2def48",
        "weights": "bc4f335869f8",
        "choices": "79fe5e4c1169",
        "counts": "94db61a6d377",
    }


def test_a_digest_covers_dtype_and_shape():
    zeros = np.zeros(4, np.float32)
    digests = {codec.digest(a) for a in (zeros, zeros.view(np.int32), zeros.reshape(2, 2), zeros[:2])}
    assert len(digests) == 4
    with pytest.raises(TypeError, match="cannot be exchanged"):
        codec.digest(zeros.astype(">f4"))


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(2, 600))
def test_a_few_channels_are_outliers_and_the_rest_is_not(seed, width):
    x = np.abs(make.activations(seed, "x", 32, width))
    steady = (x > 12).all(axis=0)
    assert steady.sum() == make.outlier_channels(width)
    assert x.max() < 80, "float16 products must stay finite"


def test_the_body_of_the_activations_has_heavy_tails_and_the_stated_norm():
    x = make.activations(0, "x", 512, 512)
    outliers = (np.abs(x) > 12).all(axis=0)
    body = x[:, ~outliers]
    kurtosis = (body**4).mean() / (body**2).mean() ** 2
    assert kurtosis > 6, "a normal distribution has 3"
    assert np.sqrt((x**2).sum(1)).mean() == pytest.approx(make.typical_norm(512), rel=0.25)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_router_has_near_ties_and_clear_winners(seed):
    x, gate = make.activations(seed, "x", 64, 256), make.gate(seed, "g", 64, 256)
    logits = np.sort(x @ gate.T, axis=1)[:, ::-1]
    gaps = logits[:, 5] - logits[:, 6]  # the sixth against the seventh
    assert (gaps > 1e-2).any()
    assert (np.diff(-logits, axis=1) < 2e-2).any(), "some pair of experts is nearly tied"
    assert 0.3 < logits.std() < 12


@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(0, 40), experts=st.integers(1, 40), data=st.data())
@example(seed=0, tokens=3, experts=3, data=None)  # the last token is also one of the hot expert's
def test_choices_are_distinct_and_in_range(seed, tokens, experts, data):
    k = data.draw(st.integers(1, experts)) if data is not None else 1
    chosen = make.choices(seed, "c", tokens, experts, k)
    assert chosen.shape == (tokens, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    if tokens:
        assert 0 <= chosen.min() <= chosen.max() < experts
    if experts > k + 1 and tokens > 1:
        counts = np.bincount(chosen.ravel(), minlength=experts)
        assert (counts == 0).any(), "an expert is empty"
        assert (counts == 1).any(), "an expert has one row"


@given(seed=st.integers(0, 2**32 - 1), experts=st.sampled_from([8, 60, 64, 128, 256]))
def test_counts_hit_an_empty_expert_a_single_row_and_one_modulo_sixteen(seed, experts):
    counts = make.sweep_counts(seed, "n", experts, 256)
    assert len(counts) == experts
    assert (counts == 0).any()
    assert (counts % 16 == 1).any()
    assert counts.min() >= 0
    from_the_empty_end = counts if experts % 64 == 0 else counts[::-1]
    assert (from_the_empty_end[[0, 1, -1]] > 0).tolist() == [False, True, True]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 100))
def test_a_permutation_has_every_index_once(seed, n):
    assert sorted(make.permutation(seed, "p", n).tolist()) == list(range(n))


def test_storing_rounds_to_nearest_even():
    halves = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-7])  # two ties and an exact number
    assert make.store(halves, "bfloat16").astype(float).tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]


@pytest.mark.parametrize("design", ["as_it_occurs", "integers", "cancelling", "one_hot", "backward_integers"])
def test_the_weights_do_not_depend_on_how_many_experts_are_made_at_a_time(design, monkeypatch):
    size = designs.Size(np.array([3, 0, 1, 5, 2, 1, 4]), 24, 16, "bfloat16", 7)
    whole = getattr(designs, design)(size)
    monkeypatch.setattr(make, "SLAB", 2 * 24 * 16)
    parts = getattr(designs, design)(size)
    assert {name: array.tobytes() for name, array in parts.items()} == {k: v.tobytes() for k, v in whole.items()}


def test_every_intermediate_result_of_the_backward_design_is_exact_in_bfloat16():
    size = designs.Size(np.array([40, 0, 33]), 64, 32, "float32", 3)
    arrays = {name: np.asarray(a, np.float64) for name, a in designs.backward_integers(size).items()}
    for e, rows in spans(size.counts_E):
        u = arrays["x_RD"][rows] @ arrays["w3_EFD"][e].T
        dh = arrays["dy_RD"][rows] @ arrays["w2_EDF"][e]
        assert np.abs(dh).max() > 1
        assert np.abs(u).max() > 1
        for inner in (u, designs.ONE * u, dh, designs.ONE * dh, dh * u):
            assert (inner.astype(ml_dtypes.bfloat16).astype(np.float64) == inner).all()


def test_what_was_made_last_is_kept_up_to_a_number_of_bytes_and_cannot_be_changed():
    made = []

    def make_array(name, size):
        made.append(name)
        return np.zeros(size, np.uint8)

    kept = Kept(100)
    for name, size in (("a", 20), ("b", 20), ("a", 20), ("huge", 26), ("huge", 26), ("c", 25), ("d", 25), ("e", 25)):
        array = kept.get(name, lambda n=name, s=size: make_array(n, s))
        assert array.size == size
        assert not array.flags.writeable
    assert made == ["a", "b", "huge", "huge", "c", "d", "e"]
    kept.get("a", lambda: make_array("a", 20))
    kept.get("b", lambda: make_array("b", 20))
    assert made[-1] == "b", "the one that was used longest ago went first"
    assert made.count("a") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_of_no_rows_has_the_strides_that_torch_gives_it(dtype):
    # numpy's have strides of 0: torch's grouped product refuses them, and no implementation ever meets them elsewhere.
    tensor = codec.to_torch(make.store(np.zeros((0, 64)), dtype), torch.device("cpu"))
    assert tensor.stride() == torch.empty(0, 64).stride()
