# SPDX-License-Identifier: Apache-2.0
"""What NCCL takes and gloo does not, between two ranks on a CPU."""

import re
import subprocess
import sys
import textwrap

import pytest

OPTIONS = ("--device", "cpu", "--nproc", "2")
START = """
    import os, torch, torch.distributed as dist
    dist.init_process_group("nccl")
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)

    def numbers(*shape, of=rank):
        return (torch.arange(torch.Size(shape).numel(), device=device) + 100.0 * of).view(shape)
"""
END = """
    os.write(1, f"rank {rank} done\\n".encode())
    dist.destroy_process_group()
"""


def run(program, text):
    done = program(START + text + END, options=OPTIONS)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall("rank . done", done.stdout)) == ["rank 0 done", "rank 1 done"]


def test_shapes_need_not_fit_where_the_numbers_of_elements_do(program):
    run(program, """
    for shape, whole in ((5,), (10,)), ((1, 5), (10,)), ((2, 3), (12,)), ((2, 3), (4, 3)), ((2, 3), (2, 2, 3)), ((), (2,)):
        found = torch.empty(whole, device=device)
        dist.all_gather_into_tensor(found, numbers(*shape))
        want = torch.cat([numbers(*shape, of=i).flatten() for i in range(2)])
        assert torch.equal(found.flatten(), want), (shape, whole)
        total, mean = torch.empty(shape, device=device), torch.empty(shape, device=device)
        dist.reduce_scatter_tensor(total, numbers(*whole))
        dist.reduce_scatter_tensor(mean, numbers(*whole), op=dist.ReduceOp.AVG, async_op=True).wait()
        want = (numbers(*whole, of=0) + numbers(*whole, of=1)).flatten().chunk(2)[rank]
        assert torch.equal(total.flatten(), want) and torch.equal(mean.flatten(), want / 2), (shape, whole)
    """)  # fmt: skip


def test_a_group_is_split(program):
    split = (
        START.replace('("nccl")', '("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))')
        + """
    own = dist.split_group(split_ranks=[[1], [0]], group_desc="alone")
    assert dist.get_process_group_ranks(own) == [rank] and dist.get_backend(own) == "nccl"
    x = numbers(3)
    dist.all_reduce(x, group=own)
    assert torch.equal(x, numbers(3))
    both = dist.split_group(dist.new_group(), [[1, 0]])
    dist.all_reduce(x, group=both)
    assert torch.equal(x, numbers(3, of=0) + numbers(3, of=1))
    assert (dist.split_group(split_ranks=[[0]]) is None) == (rank == 1)
    for i in range(2):
        again = dist.split_group(split_ranks=[[0, 1]])
        assert "split" in again.group_desc
        dist.barrier(again)
        dist.destroy_process_group(again)
    alone, both = dist.new_group([0]), dist.new_group([0, 1])  # of which one rank has more than the other
    for i in range(2):
        again = dist.split_group(both, [[1, 0]])
        dist.barrier(again)
    for wrong in [], [[]], [[0, 0]], [[0, 9], [1]]:
        try:
            dist.split_group(split_ranks=wrong)
        except ValueError:
            continue
        raise AssertionError(wrong)
    own = dist.split_group(split_ranks=[[1], [0]], backend="cuda:nccl")
    assert dist.get_backend(own) == "cuda:nccl" and dist.get_process_group_ranks(own) == [rank]
    again = dist.new_group([0, 1])
    dist.destroy_process_group(again)
    for parent, backend, why in ((again, None, "not registered"), (both, "cpu:gloo", "not present"),
                                 (both, "cuda:gloo", "mismatch")):
        try:
            dist.split_group(parent, [[0, 1]], backend=backend)
        except ValueError as error:
            assert why in str(error), error
        else:
            raise AssertionError(why)
    """
    )
    done = program(split + END, options=OPTIONS)
    assert done.returncode == 0, done.stderr
    run(
        program,
        """
    try:
        dist.split_group(split_ranks=[[0], [1]])
    except RuntimeError as error:
        assert "No device associated" in str(error)
    """,
    )


def test_a_group_that_outlives_an_adoption_is_known_to_the_next(tmp_path):
    code = """
    import os, hal
    for i in range(2):
        with hal.adopt("cpu"):
            import torch, torch.distributed as dist
            if i == 0:
                dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
            parts = dist.split_group(split_ranks=[[0, 1]]), dist.split_group(split_ranks=[[0, 1]])
            assert {dist.get_backend(), *map(dist.get_backend, parts)} == {"nccl"}
            for part in parts:
                x = torch.ones(1, device="cuda")
                dist.all_reduce(x, group=part)
                assert x.item() == 2
    with hal.adopt("cpu"):
        dist.destroy_process_group()
    os.write(1, b"done")
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    file = tmp_path / "adopts.py"
    file.write_text(textwrap.dedent(code))
    done = subprocess.run([*torchrun, str(file)], capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout.count("done") == 2, done.stderr


def test_subgroups_are_those_of_a_hosts_devices(program):
    run(program, """
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook

    host, groups = dist.new_subgroups()
    assert dist.get_process_group_ranks(host) == [0, 1] and groups == [host] and dist.get_backend(host) == "nccl"
    own, groups = dist.new_subgroups(1, backend="cpu:gloo,cuda:nccl")
    assert dist.get_process_group_ranks(own) == [rank] and dist.get_backend(own) == "cpu:gloo,cuda:nccl"
    own, groups = dist.new_subgroups_by_enumeration([[1], [0]], backend="nccl")
    assert dist.get_process_group_ranks(own) == [rank] and len(groups) == 2 and dist.get_backend(own) == "nccl"

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False).cuda(), device_ids=[rank])
    state = PostLocalSGDState(None, None, 1)
    model.register_comm_hook(state, post_localSGD_hook)
    for _ in range(3):
        model(numbers(1, 2)).sum().backward()
    assert dist.get_process_group_ranks(state.subgroup) == [0, 1] and dist.get_backend(state.subgroup) == "nccl"
    want = 3 * (numbers(1, 2, of=0) + numbers(1, 2, of=1)) / 2
    assert torch.equal(model.module.weight.grad, want)
    """)  # fmt: skip


def test_parts_of_different_sizes_are_gathered_and_the_rank_may_wait_later(program):
    run(program, """
    group = dist.new_group([0, 1], backend="nccl")
    for how in {}, {"group": group}:
        parts = [torch.empty(3 + i, 2, device=device) for i in range(2)]
        dist.all_gather(parts, numbers(3 + rank, 2), **how)
        assert all(torch.equal(part, numbers(3 + i, 2, of=i)) for i, part in enumerate(parts))
        work = dist.all_gather([part.zero_() for part in parts], numbers(3 + rank, 2), async_op=True, **how)
        assert work.wait() and work.is_completed() and work.is_success()
        assert all(torch.equal(part, numbers(3 + i, 2, of=i)) for i, part in enumerate(parts))
        assert all(torch.equal(a, b) for a, b in zip(work.get_future().wait(), parts))
    try:
        dist.all_gather([torch.empty(1, device=device), torch.empty(2, device=device)], numbers(7))
    except ValueError as error:
        assert "[7]" in str(error)
    else:
        raise AssertionError("a part that does not fit was gathered")
    """)  # fmt: skip


def test_every_work_has_a_future(program):
    run(program, """
    import time
    from datetime import timedelta

    part, whole = torch.empty(2, device=device), numbers(4)
    want = (numbers(4, of=0) + numbers(4, of=1)).chunk(2)[rank]
    for call in (
        lambda: dist.reduce_scatter_tensor(part, whole, async_op=True),
        lambda: dist.reduce_scatter(part, list(whole.chunk(2)), async_op=True),
    ):
        work = call()
        doubled = work.get_future().then(lambda done: done.value()[0] * 2)
        assert torch.equal(doubled.wait(), want * 2)
        assert work.is_completed() and work.is_success() and torch.equal(part.zero_() + want, want)
        work = call()
        assert isinstance(work, dist.Work)
        while not work.is_completed():
            time.sleep(0.01)
        assert work.wait(timeout=timedelta(seconds=60)) and torch.equal(part, want)
    assert dist.reduce_scatter_tensor(part, whole) is None
    if rank == 1:
        time.sleep(0.1)
    for work in (dist.all_reduce(whole, async_op=True), dist.broadcast(whole, 0, async_op=True)):
        work.get_future().wait()
    """)  # fmt: skip


def test_a_callback_may_wait_for_another_work(program):
    run(
        program,
        """
    whole, first, second = numbers(4), torch.empty(2, device=device), torch.empty(2, device=device)
    later = dist.reduce_scatter_tensor(first, whole, async_op=True).get_future().then(
        lambda _: dist.reduce_scatter_tensor(second, whole, async_op=True).get_future().wait()[0] * 2
    )
    assert torch.equal(later.wait(), first * 2)
    """,
    )


def test_futures_hold_what_nccls_do(program):
    run(program, """
    parts, whole = [torch.empty(2, device=device) for _ in range(2)], torch.empty(4, device=device)
    want = torch.stack([numbers(2, of=0), numbers(2, of=1)])
    (gathered,) = dist.all_gather(parts, numbers(2), async_op=True).get_future().wait()
    assert torch.equal(gathered, want)
    found = dist.all_gather_into_tensor(whole, numbers(2), async_op=True).get_future().then(lambda f: f.value()[0].div_(2))
    assert torch.equal(found.wait(), want.view(-1) / 2) and torch.equal(whole, want.view(-1) / 2)
    with dist._coalescing_manager(device=device, async_ops=True) as manager:
        dist.all_gather_into_tensor(whole, numbers(2))
    assert torch.equal(manager.works[0].get_future().wait()[0], want.view(-1))
    """)  # fmt: skip


def test_groups_own_methods_take_torchs_names(program):
    run(program, """
    group, x, part, whole = dist.group.WORLD, numbers(2), torch.empty(1, device=device), torch.empty(4, device=device)
    want = torch.cat([numbers(2, of=0), numbers(2, of=1)])
    parts = [torch.empty(2, device=device) for _ in range(2)]
    for work in (
        group._allgather_base(output=whole, input=x), group.allgather(parts, x),
        group.allgather(output_tensors=[parts], input_tensors=[x]),
    ):
        assert torch.equal(work.get_future().wait()[0].flatten(), want)
    assert torch.equal(whole, want)
    for call in (
        lambda: group._reduce_scatter_base(outputTensor=part, inputTensor=x),
        lambda: group.reduce_scatter(part, list(x.chunk(2))),
        lambda: group.reduce_scatter(output_tensors=[part], input_tensors=[list(x.chunk(2))]),
    ):
        assert call().get_future().wait()[0].item() == want.view(2, 2).sum(0)[rank].item()
    """)  # fmt: skip


def test_callbacks_run_at_once_in_the_order_in_which_they_were_added(program):
    run(program, """
    import threading

    order, x = [], numbers(1000)
    works = [dist.all_reduce(x.clone(), async_op=True) for _ in range(4)]
    for i, work in enumerate(works):
        work.get_future().then(lambda _, i=i: order.append((i, threading.get_ident())))
    assert order == [(i, threading.get_ident()) for i in range(4)]
    """)  # fmt: skip


def test_a_work_is_done_where_the_device_was_told_to_wait(program):
    run(program, """
    for wait in "synchronize", "block_current_stream":
        x = torch.ones(3_000_000, device=device)
        work = dist.all_reduce(x, async_op=True)
        if hasattr(work, wait):
            getattr(work, wait)()
            assert x.min().item() == 2
    """)  # fmt: skip


HOOKS = {
    "PowerSGD": "hook, state = powerSGD.powerSGD_hook, powerSGD.PowerSGDState(None, 1, start_powerSGD_iter=2)",
    "PowerSGD in float16": "hook = default.fp16_compress_wrapper(powerSGD.powerSGD_hook)\n"
    "    state = powerSGD.PowerSGDState(None, 1, start_powerSGD_iter=2)",
    "quantised": "hook, state = quantization.quantization_pertensor_hook, dist.group.WORLD",
    "scatter, then gather": "hook, state = scattered, None",
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_several_buckets_that_begin_collectives_in_callbacks(program, name):
    run(program, """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks as default
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powerSGD
    from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks as quantization

    def scattered(state, bucket):
        whole = torch.nn.functional.pad(bucket.buffer(), (0, bucket.buffer().numel() % 2))
        part = torch.empty(whole.numel() // 2, device=device)

        def gather(future):
            dist.all_gather_into_tensor(whole, future.value()[0].div_(2))
            return whole[: bucket.buffer().numel()]

        return dist.reduce_scatter_tensor(part, whole, async_op=True).get_future().then(gather)

    HOOK
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)]).to(device)
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank], bucket_cap_mb=0.02)
    model.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(6):
        loss = model(numbers(8, 64) / 100).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    both = [torch.empty(1, device=device) for _ in range(2)]
    dist.all_gather(both, sum(p.detach().double().sum() for p in model.parameters()).float().view(1))
    assert torch.equal(*both)
    """.replace("HOOK", HOOKS[name]))  # fmt: skip


def test_calls_that_are_made_one_may_each_be_asynchronous(program):
    run(
        program,
        """
    outputs, inputs = [torch.empty(2, device=device) for _ in range(3)], [numbers(4) * (i + 1) for i in range(3)]
    with dist.distributed_c10d._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
        for output, given in zip(outputs, inputs):
            dist.reduce_scatter_tensor(output, given, async_op=True)
    manager.wait()
    for i, output in enumerate(outputs):
        assert torch.equal(output, (numbers(4, of=0) + numbers(4, of=1)).chunk(2)[rank] * (i + 1))
    """,
    )


def test_what_is_gathered_has_a_gradient(program):
    run(
        program,
        """
    from torch.distributed.nn import functional
    x = numbers(2, 3).requires_grad_()
    whole = functional._all_gather_base(torch.empty(4, 3, device=device), x)
    whole.mul(1 + torch.arange(4.0, device=device)[:, None]).sum().backward()
    assert torch.equal(x.grad, 2 * torch.arange(2 * rank + 1.0, 2 * rank + 3, device=device)[:, None].expand(2, 3))
    """,
    )


def test_several_calls_are_made_one(program):
    run(program, """
    def coalesced(**how):
        a, b = torch.ones(2, device=device), torch.ones(3, device=device)
        with dist._coalescing_manager(**how) as manager:
            dist.all_reduce(a)
            dist.all_reduce(b)
        manager.wait() if how.get("async_ops") else None
        assert a.tolist() == [2, 2] and b.tolist() == [2, 2, 2]
        whole, part, total = torch.empty(2, 3, 1, device=device), numbers(3), torch.empty(1, 2, device=device)
        with dist._coalescing_manager(**how) as manager:
            dist.all_gather_into_tensor(whole, part, async_op=True)
        manager.wait() if how.get("async_ops") else None
        assert torch.equal(whole.flatten(), torch.cat([numbers(3, of=0), numbers(3, of=1)]))
        with dist._coalescing_manager(**how) as manager:
            dist.reduce_scatter_tensor(total, numbers(4))
        manager.wait() if how.get("async_ops") else None
        assert torch.equal(total[0], (numbers(4, of=0) + numbers(4, of=1)).chunk(2)[rank])

    coalesced()
    coalesced(device=device)
    coalesced(device=device, async_ops=True)
    """)  # fmt: skip


def test_what_does_not_fit_is_torchs_error(program):
    run(program, """
    for call in (
        lambda: dist.all_gather_into_tensor(torch.empty(9, device=device), numbers(5)),
        lambda: dist.reduce_scatter_tensor(torch.empty(4, device=device), numbers(10)),
    ):
        try:
            call()
        except (RuntimeError, ValueError):
            continue
        raise AssertionError("sizes that do not fit were taken")
    """)  # fmt: skip


def test_sharded_models_divide_their_gradients_by_what_the_program_says(program):
    run(program, """
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 4, device="cuda")
    fully_shard(model)
    model.set_gradient_divide_factor(3.0)
    model(torch.full((2, 4), 1.0 + rank, device="cuda")).sum().backward()
    assert model.weight.grad.to_local().tolist() == [[2.0] * 4] * 2  # (2 + 4) / 3
    """)  # fmt: skip


def test_a_group_of_nccl_says_so_and_has_no_monitored_barrier(program):
    run(program, """
    from datetime import timedelta
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    gloo, both = dist.new_group(backend="gloo"), dist.new_group(backend="cpu:gloo,cuda:nccl")
    names = dist.group.WORLD.name(), dist.new_group().name(), both.name(), gloo.name()
    assert names == ("nccl", "nccl", "nccl", "gloo"), names
    for group in None, dist.group.WORLD, both:
        try:
            dist.monitored_barrier(group)
        except ValueError as error:
            assert "only implemented for GLOO" in str(error)
        else:
            raise AssertionError("a barrier that NCCL has not")
    dist.monitored_barrier(gloo, timeout=timedelta(seconds=60))
    dist.monitored_barrier(dist.new_group([0], backend="gloo"))  # one of the two is no member
    assert (dist.new_group([0], use_local_synchronization=True) is None) == (rank == 1)
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("cpu",))
    assert "'cuda'" in str(mesh) and "'cpu'" not in str(mesh) and "cpu=2" in repr(mesh), str(mesh)
    placed = distribute_tensor(torch.ones(2, device=device), mesh)
    assert "'cpu'" not in str(placed), str(placed)
    """)  # fmt: skip


def test_what_is_added_may_be_multiplied_first(program):
    run(program, """
    def half(on=None):
        return dist._make_nccl_premul_sum(0.5 if on is None else torch.tensor([0.5], device=on))

    for kind in torch.float32, torch.bfloat16:
        want = (numbers(4, of=0) + numbers(4, of=1)).to(kind) / 2
        for op in half(), half(device):
            for later in False, True:
                x = numbers(4).to(kind).requires_grad_()
                work = dist.all_reduce(x, op=op, async_op=later)
                assert (work.wait() if later else True) and torch.equal(x, want), x
                x = numbers(4).to(kind)
                work = dist.reduce(x, 1, op, async_op=later)
                assert (work.wait() if later else True) and torch.equal(x, want if rank == 1 else numbers(4).to(kind))
                given, x = numbers(4).to(kind), torch.empty(2, dtype=kind, device=device)
                work = dist.reduce_scatter_tensor(x, given, op=op, async_op=later)
                assert (work.wait() if later else True) and torch.equal(x, want.chunk(2)[rank])
                work = dist.reduce_scatter(x.zero_(), list(given.chunk(2)), op=op, async_op=later)
                assert (work.wait() if later else True) and torch.equal(x, want.chunk(2)[rank])
                assert torch.equal(given, numbers(4).to(kind))
    x = numbers()
    dist.all_reduce(x, half(device))
    assert x.item() == 50
    x = numbers(2)
    dist.reduce(x, group_dst=0, op=dist.ReduceOp.MAX)
    assert rank or x.tolist() == [100, 101]
    dist.all_reduce(x.fill_(rank), dist.ReduceOp.MAX)
    dist.all_reduce(x)
    assert x.tolist() == [2, 2]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x + 1

    assert compiled(torch.full((2,), float(rank), device=device)).tolist() == [2, 2]
    """)  # fmt: skip
