# SPDX-License-Identifier: Apache-2.0
import hashlib
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal import philox
from hal.errors import ConfigError
from hal.random import RandomStream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_published_vectors_of_philox4x32_10_come_out(counter, key, expected):
    """Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    first = counter[0] | counter[1] << 32
    stream = counter[2] | counter[3] << 32
    (words,) = philox.blocks(key[0] | key[1] << 32, stream, first, 1)
    assert tuple(int(w) for w in words) == expected


@given(
    seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**64 - 1), offset=st.integers(0, 40), n=st.integers(0, 40)
)
def test_any_part_of_a_stream_can_be_had_without_what_lies_before(seed, stream, offset, n):
    whole = philox.bits(seed, stream, offset + n)
    assert np.array_equal(whole[offset:], philox.bits(seed, stream, n, offset=offset))


@given(seed=st.integers(0, 2**64 - 1), name=st.text(max_size=8), jump=st.integers(0, 2**40), n=st.integers(0, 33))
def test_a_torch_stream_has_the_same_bits_as_the_host(seed, name, jump, n):
    for draw, expected in [("bits", philox.bits), ("uniform", philox.uniform), ("normal", philox.normal)]:
        stream = RandomStream(seed, name, torch.device("cpu"), jump)
        drawn = getattr(stream, draw)(n).numpy()
        assert np.array_equal(drawn, expected(seed, name, n, offset=jump).astype(drawn.dtype))
        assert stream.position == jump + n


def test_the_bits_of_a_stream_never_change():
    """A digest written down once: another one means that every recording and every saved run is void."""
    normal = philox.normal(2026, "weights", 4096)
    assert hashlib.sha256(normal.tobytes()).hexdigest() == EXPECTED_DIGEST


EXPECTED_DIGEST = "8266642ef19164ac052c1b23024858214cdd54b80068aa0804dc6658cc542b95"


def test_normal_agrees_with_the_inverse_distribution_function():
    p = np.array([2.0**-33, 1e-9, 1e-6, 0.01, 0.0749, 0.0751, 0.3, 0.5, 0.7, 0.9251, 0.999, 1 - 1e-9])
    expected = np.array([statistics.NormalDist().inv_cdf(x) for x in p])
    # AS 241 is accurate to about 1e-16; a few roundings of float64 in evaluating two polynomials of degree 7 each.
    assert np.all(np.abs(philox._inverse_normal(p) - expected) <= 16 * 2.0**-53 * np.maximum(np.abs(expected), 1))


def test_normal_has_the_moments_of_a_normal_distribution():
    n = 1_000_000
    z = philox.normal(1, "moments", n).astype(np.float64)
    # Five standard errors of each sample moment: var(z) = 1, var(z^2) = 2, var(z^4) = 96.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(bad):
    with pytest.raises(ConfigError, match="the seed is"):
        philox.bits(bad, 0, 1)
    with pytest.raises(ConfigError, match="the stream is"):
        philox.bits(0, bad, 1)
