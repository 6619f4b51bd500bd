# SPDX-License-Identifier: Apache-2.0
"""Seeds, states and portable streams refuse what they cannot mean, and a refused draw moves nothing."""

import numpy as np
import pytest
import torch

import hal
from hal import philox
from hal.random import RandomStream


@pytest.fixture
def device():
    with hal.open_device("cpu") as opened:
        yield opened


def stream(position=0):
    return RandomStream(7, "noise", torch.device("cpu"), position)


@pytest.mark.parametrize("bad", [-1, 2**64, "a", 1.0, None, True])
def test_a_seed_that_is_none_is_a_setting_that_is_wrong(device, bad):
    with pytest.raises(hal.ConfigError, match="the seed is"):
        device.random.seed(bad)
    with pytest.raises(hal.ConfigError, match="the seed is"):
        device.random.stream(bad, "noise")


def test_a_seed_may_be_an_integer_of_numpys(device):
    device.random.seed(np.uint64(7))
    first = torch.rand(3)
    device.random.seed(7)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(device.random.stream(np.int64(7), "noise").bits(5), stream().bits(5))


@pytest.mark.parametrize("bad", [None, "state", torch.zeros(3, dtype=torch.uint8), torch.zeros(5056)])
def test_what_is_no_state_is_a_setting_that_is_wrong(device, bad):
    before = device.random.get_state()
    with pytest.raises(hal.ConfigError, match="no state"):
        device.random.set_state(bad)
    assert torch.equal(device.random.get_state(), before)


@pytest.mark.parametrize("name", [-1, 2**64, 1.5, None])
def test_a_stream_is_named_by_a_text_or_a_64_bit_number(device, name):
    with pytest.raises(hal.ConfigError, match="the stream is"):
        device.random.stream(1, name)


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (-2, -3), (1.5,), ("3",), ((2, 3),), (2**64,)])
@pytest.mark.parametrize("draw", ["bits", "uniform", "normal"])
def test_a_shape_that_is_none_is_refused_before_the_position_moves(draw, shape):
    drawn = stream(position=5)
    with pytest.raises(hal.ConfigError):
        getattr(drawn, draw)(*shape)
    assert drawn.position == 5


@pytest.mark.parametrize("position", [-1, -5, 2**64, 1.5, None])
def test_a_position_outside_the_stream_is_refused(position):
    with pytest.raises(hal.ConfigError, match="the position"):
        stream(position)
    drawn = stream(3)
    with pytest.raises(hal.ConfigError, match="the position"):
        drawn.position = position
    assert drawn.position == 3


@pytest.mark.parametrize("draw", ["bits", "uniform", "normal"])
def test_the_last_words_of_a_stream_can_be_drawn_and_no_more(draw):
    last = 2**64 - 1
    drawn = stream(last - 6)
    values = getattr(drawn, draw)(2, 3).reshape(-1).numpy()
    assert np.array_equal(values, getattr(philox, draw)(7, "noise", 6, offset=last - 6).astype(values.dtype))
    assert drawn.position == last
    with pytest.raises(hal.ConfigError, match="position after the draw"):
        getattr(drawn, draw)(1)
    assert getattr(drawn, draw)(0).shape == (0,)


def test_the_host_functions_refuse_the_same():
    for call in (
        lambda: philox.bits(1, "x", -1),
        lambda: philox.bits(1, "x", 1, offset=-1),
        lambda: philox.bits(1, "x", 1, offset=2**64),
        lambda: philox.bits(1.0, "x", 1),
        lambda: philox.normal(1, None, 1),
    ):
        with pytest.raises(hal.ConfigError):
            call()


def test_a_closed_device_has_no_generator(device):
    kept = device.random
    state = kept.get_state()
    device.close()
    for call in (lambda: kept.seed(1), kept.get_state, lambda: kept.set_state(state), lambda: kept.stream(1, "x")):
        with pytest.raises(hal.DeviceClosed):
            call()
