# SPDX-License-Identifier: Apache-2.0
"""Real processes over gloo on the loopback interface."""

import os
import time

import torch
import torch.multiprocessing as mp

import hal


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
