# SPDX-License-Identifier: Apache-2.0
"""What `count_tensors` counts, in bytes worked out by hand: float32 has 4."""

import copy

import numpy as np
import pytest
import torch

import hal


@pytest.fixture
def memory():
    with hal.open_device("cpu") as device:
        yield device.memory


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[0],
        lambda x: x.view(10, 10),
        lambda x: x.detach(),
        lambda x: x.add_(1),
        lambda x: torch.mul(x, 2, out=x),
        lambda x: torch.empty(0).set_(x.untyped_storage()),
        lambda x: x.resize_(50),
    ],
)
def test_a_tensor_from_before_the_block_counts_nothing_when_it_is_viewed_or_written(memory, use):
    x = torch.zeros(100)
    with memory.count_tensors() as counter:
        kept = use(x)
        assert (counter.current, counter.peak) == (0, 0)
    del kept


def test_what_a_tensor_grows_by_counts_whether_it_was_made_inside_or_before(memory):
    old = torch.zeros(100)
    with memory.count_tensors() as counter:
        old.resize_(300)
        assert counter.current == 800
        new = torch.zeros(10)
        new.resize_(1000)
        assert counter.current == 800 + 4000
        new.untyped_storage().resize_(0)  # no operator, as sharded data parallelism does
        assert counter.current == 800
        assert counter.peak == 4800
        torch.add(torch.ones(5), 1, out=old.resize_(0))
        assert counter.current == 800


def test_a_result_that_grows_to_fit_counts_what_it_grew_by(memory):
    out = torch.empty(0)
    with memory.count_tensors() as counter:
        torch.ones(25, out=out)
        assert counter.current == 100


def test_a_tensor_made_from_python_numbers_counts_and_one_on_numpys_memory_does_not(memory):
    with memory.count_tensors() as counter:
        kept = torch.tensor([1.0, 2.0])
        assert counter.current == 8
        shared = torch.from_numpy(np.ones(100))
        shared += 1
        assert counter.current == 8
    del kept


def test_the_gradients_of_a_model_from_before_the_block_count(memory):
    model = torch.nn.Linear(10, 5)
    with memory.count_tensors() as counter:
        model(torch.ones(3, 10)).sum().backward()
        assert counter.current == 4 * (5 * 10 + 5)
        kept = copy.deepcopy(model)  # with its gradients
        assert counter.current >= 2 * 4 * (5 * 10 + 5)
    del kept


def test_a_tensor_made_of_others_counts_as_its_parts(memory):
    from torch.testing._internal.two_tensor import TwoTensor

    with memory.count_tensors() as counter:
        pair = TwoTensor(torch.ones(10), torch.ones(10))
        kept = pair + pair
        assert counter.current == 4 * 40
    del kept


def test_fake_and_meta_and_sparse_tensors_hold_no_bytes_that_are_counted(memory):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with memory.count_tensors() as counter:
        with FakeTensorMode():
            fake = torch.ones(1000) + 1
        meta = torch.empty(1000, device="meta") + 1
        assert counter.current == 0
        sparse = torch.eye(3).to_sparse()
        assert counter.current == 0
    del fake, meta, sparse


def test_the_address_of_a_dead_tensor_can_be_used_again(memory):
    with memory.count_tensors() as counter:
        for n in range(1, 200):
            made = torch.zeros(n)
            assert counter.current == 4 * n
            del made
            assert counter.current == 0
        assert counter.peak == 4 * 199
        counter.reset_peak()
        assert counter.peak == 0
