# SPDX-License-Identifier: Apache-2.0
"""Real processes over gloo on the loopback interface; a group of one where a second rank would change nothing."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hal
from hal.collectives import Collectives
from hal.group import library_errors


def everything(rank: int, size: int, store: str) -> None:
    """One rank: every operation against what arithmetic says."""
    with hal.open_device("cpu") as device:
        group = device.collectives.init(rank=rank, world_size=size, init_method=f"file://{store}", timeout_s=60)
        assert (group.rank, group.size) == (rank, size)
        x = torch.full((4,), float(rank + 1))
        group.all_reduce(x)
        assert x.tolist() == [float(sum(range(1, size + 1)))] * 4
        x = torch.full((2,), float(rank))
        group.reduce(x, root=1, reduction="max")
        assert rank != 1 or x.tolist() == [size - 1.0] * 2
        x = torch.full((2,), float(rank))
        group.broadcast(x, root=size - 1)
        assert x.tolist() == [size - 1.0] * 2
        gathered = torch.empty(size, 3)
        group.all_gather(gathered, torch.full((1, 3), float(rank)))
        assert gathered[:, 0].tolist() == [float(r) for r in range(size)]
        part = torch.empty(1, 2)
        group.reduce_scatter(part, torch.arange(size * 2, dtype=torch.float32).reshape(size, 2))
        assert part[0].tolist() == [size * 2.0 * rank, size * (2.0 * rank + 1)]
        # Uneven, with zero splits: rank r sends r rows to each rank.
        received = torch.empty(sum(range(size)), 1)
        group.all_to_all(received, torch.full((rank * size, 1), float(rank)), list(range(size)), [rank] * size)
        assert received[:, 0].tolist() == [float(r) for r in range(size) for _ in range(r)]
        if rank == 0:
            group.send(torch.tensor([7.0]), to=1)
        elif rank == 1:
            group.recv(x[:1], source=0)
            assert x[0] == 7.0
        group.barrier()
        for bad in (lambda: group.broadcast(x, root=size), lambda: group.all_reduce(torch.empty(1, device="meta"))):
            try:
                bad()
            except hal.CollectiveError as error:
                assert error.rank == rank
            else:
                raise AssertionError("a bad argument was accepted")
        for wrong in (
            {"rank": 0, "world_size": 7},
            {"rank": (rank + 1) % size, "world_size": size},
            {"timeout_s": 1},
            {"init_method": f"file://{store}"},
        ):
            try:
                device.collectives.init(**wrong)
            except hal.CollectiveError as error:
                assert "runs already" in str(error), error
            else:
                raise AssertionError(f"{wrong} was ignored")
        joined = device.collectives.init(rank=rank, world_size=size, timeout_s=60)
        assert (joined.rank, joined.size) == (rank, size)
        joined.barrier()
        joined.close()
        group.barrier()  # the one who joined does not end it
        # Last of all: gloo's barrier waits for the work before it, and raises what a failed one among it raised.
        try:
            group.all_reduce(torch.ones(4).to(torch.float8_e4m3fn))  # gloo has no reduction for it
        except hal.CollectiveError as error:
            assert error.operation == "all_reduce"
        else:
            raise AssertionError("float8 was reduced")
        group.close()
        group.close()


def missing_rank(rank: int, size: int, store: str) -> None:
    """Rank 1 never comes to the collective."""
    with hal.open_device("cpu") as device:
        group = device.collectives.init(rank=rank, world_size=size, init_method=f"file://{store}", timeout_s=2)
        if rank == 0:
            try:
                group.all_reduce(torch.ones(1))
            except hal.CollectiveTimeout as error:
                assert error.operation == "all_reduce"
                assert error.rank == 0
                assert error.__cause__ is not None
                os._exit(0)  # gloo still waits in a thread of its own, which aborts an ordinary exit
            raise AssertionError("a collective without its peer completed")
        time.sleep(6)


def test_every_operation_gives_what_arithmetic_says(tmp_path):
    mp.spawn(everything, args=(3, str(tmp_path / "store")), nprocs=3)


def test_a_missing_rank_is_a_typed_timeout(tmp_path):
    mp.spawn(missing_rank, args=(2, str(tmp_path / "store")), nprocs=2)


@pytest.fixture
def device():
    with hal.open_device("cpu") as opened:
        yield opened
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def alone(device, tmp_path):
    return device.collectives.init(rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")


@pytest.mark.parametrize(
    "call",
    [
        lambda group: group.send(torch.ones(1), to=0),
        lambda group: group.recv(torch.ones(1), source=0),
        lambda group: group.all_to_all(torch.ones(1), torch.ones(1), [1.0], [1.0]),
        lambda group: group.all_to_all(torch.ones(1), torch.ones(1), ["1"], ["1"]),
        lambda group: group.all_to_all(torch.ones(1), torch.ones(1), [2], [1]),
        lambda group: group.broadcast(torch.ones(1), root=0.0),
        lambda group: group.broadcast(torch.ones(1), root=None),
        lambda group: group.broadcast(torch.ones(1), root=-1),
        lambda group: group.reduce(torch.ones(1), root=1),
        lambda group: group.all_reduce([1.0]),
        lambda group: group.all_gather(torch.ones(3), torch.ones(1)),
    ],
)
def test_whatever_the_library_refuses_is_one_error_that_names_operation_and_rank(alone, call):
    with pytest.raises(hal.CollectiveError) as caught:
        call(alone)
    assert type(caught.value) is hal.CollectiveError
    assert caught.value.rank == 0
    assert caught.value.operation in ("send", "recv", "all_to_all", "broadcast", "reduce", "all_reduce", "all_gather")


def test_a_wrong_name_of_a_reduction_is_a_setting_that_is_wrong(alone):
    with pytest.raises(hal.ConfigError, match="sum, avg"):
        alone.all_reduce(torch.ones(1), ["sum"])
    with pytest.raises(hal.ConfigError, match="sum, avg"):
        alone.all_reduce(torch.ones(1), "mean")


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": -1},
        {"timeout_s": 0},
        {"timeout_s": 1e-4},
        {"timeout_s": float("inf")},
        {"timeout_s": float("nan")},
        {"timeout_s": 10**400},
        {"timeout_s": "1"},
        {"timeout_s": True},
        {"rank": 0},
        {"world_size": 1},
        {"rank": 1, "world_size": 1},
        {"rank": -1, "world_size": 1},
        {"rank": 0.0, "world_size": 1},
        {"rank": 0, "world_size": "1"},
        {"init_method": 5},
    ],
)
def test_arguments_that_cannot_mean_anything_are_refused_before_the_library_is_asked(device, wrong, tmp_path):
    with pytest.raises(hal.ConfigError):
        device.collectives.init(**{"init_method": f"file://{tmp_path / 'store'}", **wrong})
    assert not dist.is_initialized()


def test_a_meeting_that_cannot_take_place_is_an_error_with_what_to_try(device, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(hal.CollectiveError, match="RANK") as caught:
        device.collectives.init()
    assert "torchrun" in caught.value.hint
    with pytest.raises(hal.CollectiveError):
        device.collectives.init(rank=0, world_size=1, init_method="nowhere://")


def test_other_ranks_that_do_not_come_are_a_timeout_of_init(device, tmp_path):
    with pytest.raises(hal.CollectiveTimeout):
        device.collectives.init(rank=0, world_size=2, init_method=f"file://{tmp_path / 'store'}", timeout_s=0.5)


def test_a_group_that_has_ended_says_so_however_it_ended(device, alone, tmp_path):
    alone.close()
    with pytest.raises(hal.CollectiveError, match="was closed"):
        alone.all_reduce(torch.ones(1))
    with pytest.raises(hal.CollectiveError, match="was closed"):
        alone.barrier()
    second = device.collectives.init(rank=0, world_size=1, init_method=f"file://{tmp_path / 'second'}")
    dist.destroy_process_group()
    third = device.collectives.init(rank=0, world_size=1, init_method=f"file://{tmp_path / 'third'}")
    with pytest.raises(hal.CollectiveError, match="ended elsewhere"):
        second.barrier()
    second.close()  # and does not end the third
    third.barrier()


def test_after_the_device_is_closed_nothing_is_started_or_sent_and_the_group_can_still_be_ended(device, alone):
    kept = device.collectives
    device.close()
    with pytest.raises(hal.DeviceClosed):
        kept.init()
    with pytest.raises(hal.DeviceClosed):
        alone.barrier()
    assert dist.is_initialized()
    alone.close()
    assert not dist.is_initialized()


def test_a_group_that_somebody_else_started_is_joined_with_its_own_timeout_and_left_running(device, tmp_path):
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=33))
    device.collectives.init(timeout_s=33).barrier()
    with pytest.raises(hal.CollectiveError, match=r"timeout_s=34 was asked for, and it has 33"):
        device.collectives.init(timeout_s=34)
    group = device.collectives.init()
    group.close()
    assert dist.is_initialized()
    with pytest.raises(hal.CollectiveError, match="was closed"):
        group.barrier()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv"), True),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)"), True),
        (RuntimeError("wait timeout after 300000ms, keys: /0"), True),
        (RuntimeError("Socket Timeout"), True),
        (RuntimeError("The client socket has timed out after 2000ms while trying to connect to (127.0.0.1, 1)."), True),
        (TimeoutError("timed out"), True),
        (RuntimeError("unhandled system error, see HCCL_CONNECT_TIMEOUT in the manual"), False),
        (ValueError("timeout must be positive"), False),
        (TypeError("timeout: expected timedelta"), False),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1234"), False),
    ],
)
def test_a_timeout_is_told_from_other_errors_by_what_the_libraries_really_say(error, expected):
    with pytest.raises(hal.CollectiveError) as caught, library_errors("all_reduce", 0):
        raise error
    assert isinstance(caught.value, hal.CollectiveTimeout) == expected
    assert caught.value.__cause__ is error


def test_a_group_is_bound_to_its_accelerator_and_no_operation_takes_another(monkeypatch):
    """On a stand-in for torch.distributed: the calls that choose a device are looked at."""
    seen = {}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **given: seen.update(given, name=name))
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 8)
    monkeypatch.setattr(dist, "barrier", lambda **given: seen.update(given))
    collectives = Collectives("gpu:3", torch.device("cuda", 3), "a library", "nccl")
    group = collectives.init(timeout_s=5)
    assert (seen["name"], seen["device_id"]) == ("nccl", torch.device("cuda", 3))
    assert seen["timeout"] == datetime.timedelta(seconds=5)
    group.barrier()
    assert seen["device_ids"] == [3]

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)

    with pytest.raises(hal.CollectiveError, match="a tensor lies on cuda:0"):
        group.all_reduce(Elsewhere())
