# SPDX-License-Identifier: Apache-2.0
"""Parallel and sharded models on ranks of a CPU, in the forms in which programs for CUDA write them."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

import hal

SHARED = """
    import os, sys
    import torch, torch.nn as nn, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", pg_options=dist.ProcessGroupNCCL.Options(is_high_priority_stream=True))

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def falls(model):
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 8, device=device)).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[-1] < losses[0]

    def is_cuda(found):
        return found == "cuda" or found.type == "cuda"
"""
END = """
    dist.destroy_process_group()
    os.write(1, b"done" + bytes([10]))
"""


def runs(program, code):
    done = program(SHARED + code + END, options=("--device", "cpu", "--nproc", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\ndone\n"


def test_sharded_models_take_what_they_take_on_cuda(program):
    runs(program, """
    from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel as FSDP

    found = FSDP(model().cuda())
    assert falls(found) and is_cuda(found.compute_device)
    assert falls(FSDP(model().cuda(), sync_module_states=True))
    assert falls(FSDP(model(), device_id=torch.cuda.current_device(), sync_module_states=True))
    assert falls(FSDP(model(), device_id=rank, cpu_offload=CPUOffload(True)))
    """)  # fmt: skip


def test_a_checkpoint_of_a_sharded_model_on_the_host_is_whole_and_its_own(program):
    runs(program, """
    import copy
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def normed():
        torch.manual_seed(rank)
        return nn.Sequential(nn.Linear(8, 300), FSDP(nn.BatchNorm1d(300), **how), nn.Linear(300, 4))

    for original in False, True:
        how = {"device_id": rank, "use_orig_params": original}
        found = FSDP(normed(), sync_module_states=True, **how)
        optimizer = torch.optim.AdamW(found.parameters(), lr=0.1)

        def train(by, optimizer):
            by(torch.arange(32.0, device=device).view(4, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        train(found, optimizer)
        with FSDP.state_dict_type(found, StateDictType.FULL_STATE_DICT):
            plain = {name: tensor.clone() for name, tensor in found.state_dict().items()}
        assert plain["0.weight"].shape == (300, 8) and plain["1.running_mean"].shape == (300,)
        for only in True, False:
            configs = (FullStateDictConfig(offload_to_cpu=True, rank0_only=only),
                       FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=only))
            with FSDP.state_dict_type(found, StateDictType.FULL_STATE_DICT, *configs):
                kept, states = found.state_dict(), FSDP.optim_state_dict(found, optimizer)
            if only and rank:
                assert kept == {}
                continue
            assert kept.keys() == plain.keys()
            assert all(torch.equal(kept[name], plain[name]) for name in plain)
            assert not any(tensor.is_cuda for tensor in kept.values())
            assert kept["0.weight"].device.type == "cpu"
        assert set(states["state"]) == {f"{index}.{name}" for index in range(3) for name in ("weight", "bias")}
        before = copy.deepcopy(states)
        train(found, optimizer)
        assert all(torch.equal(kept[name], plain[name]) for name in kept)
        for name, values in states["state"].items():
            assert all(torch.equal(values[key], before["state"][name][key]) for key in values)

        torch.save((plain, states) if rank == 0 else (), f"c{rank}.pt")
        dist.barrier()
        loaded = torch.load("c0.pt", map_location="cpu", weights_only=True)
        again = FSDP(normed(), **how)
        second = torch.optim.AdamW(again.parameters(), lr=0.1)
        with FSDP.state_dict_type(again, StateDictType.FULL_STATE_DICT, *configs):
            again.load_state_dict(loaded[0])
            second.load_state_dict(FSDP.optim_state_dict_to_load(again, second, loaded[1]))
        train(again, second)
        with FSDP.state_dict_type(found, StateDictType.FULL_STATE_DICT):
            want = {name: tensor.clone() for name, tensor in found.state_dict().items()}
        with FSDP.state_dict_type(again, StateDictType.FULL_STATE_DICT):
            assert all(torch.equal(want[name], tensor) for name, tensor in again.state_dict().items())
        got = get_model_state_dict(found, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert rank or all(torch.equal(got[name], want[name]) for name in want)
        with FSDP.summon_full_params(found, rank0_only=True, writeback=False, offload_to_cpu=True):
            assert rank or torch.equal(found[0].weight, want["0.weight"])
    """)  # fmt: skip


def test_parallel_models_say_cuda_and_take_what_they_take_there(program):
    runs(program, """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    wrapped = DDP(model().cuda(), device_ids=[rank], output_device=rank)
    assert is_cuda(wrapped.device_type) and wrapped.device_ids == [rank]
    wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    assert falls(wrapped)
    assert wrapped.output_device == rank
    assert DDP(model().cuda(), device_ids=[device]).output_device == rank
    assert DDP(model().cuda(), [rank], torch.device("cuda", rank)).output_device == rank
    assert DDP(model().cuda()).device_ids is None and DDP(model().cuda()).output_device is None
    assert nn.DataParallel(model()).device_ids == [0, 1] and nn.DataParallel(model(), [rank]).device_ids == [rank]
    assert nn.DataParallel(model(), [1]).src_device_obj == torch.device("cuda:1")
    assert init_device_mesh("cuda", (2,)).device_type == DeviceMesh("cuda", [0, 1]).device_type == "cuda"
    assert init_device_mesh("cpu", (2,)) is not None
    wrapped = DDP(model().cuda(), device_ids=[rank])
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.1)
    wrapped(torch.ones(1, 8, device=device)).sum().backward()
    optimizer.step()
    compiled = torch.compile(DDP(model().cuda(), device_ids=[rank]), backend="eager")
    compiled(torch.ones(1, 8, device=device)).sum().backward()

    stage = PipelineStage(nn.Linear(8, 8 if rank == 0 else 4).to(device), rank, 2, device)
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: (out - target).pow(2).mean())
    schedule.step(torch.ones(4, 8, device=device)) if rank == 0 else schedule.step(target=torch.zeros(4, 4, device=device))
    """)  # fmt: skip


def test_batch_norm_over_ranks_is_that_of_the_whole_batch(program):
    runs(program, """
    for shape, double in (((4, 3), True), ((2, 3, 5), True), ((2, 3, 4, 4), False)):
        torch.manual_seed(1)
        whole = torch.randn(2 * shape[0], *shape[1:], dtype=torch.float64 if double else torch.float32)
        weights = torch.randn_like(whole)
        alone = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3).to(whole.dtype)
        nn.init.normal_(alone.weight)
        kind = type(alone)(3)
        kind.load_state_dict(alone.state_dict())
        both = DDP(nn.SyncBatchNorm.convert_sync_batchnorm(kind).to(device, whole.dtype), device_ids=[rank])
        x, y = whole.clone().requires_grad_(), whole.chunk(2)[rank].clone().to(device).requires_grad_()
        for _ in range(2):
            expected, found = alone(x), both(y)
        (expected * weights).sum().backward()
        (found * weights.chunk(2)[rank].to(device)).sum().backward()
        close = torch.testing.assert_close
        close(found, expected.chunk(2)[rank].to(device))
        close(y.grad, x.grad.chunk(2)[rank].to(device))
        close(both.module.weight.grad * 2, alone.weight.grad)  # DDP divides by the ranks
        close(both.module.bias.grad * 2, alone.bias.grad)
        close(both.module.running_mean, alone.running_mean)
        close(both.module.running_var, alone.running_var)
        both.eval(), alone.eval()
        close(both(y), alone(x).chunk(2)[rank].to(device))
    """)  # fmt: skip


def test_shards_have_random_numbers_of_their_own_and_replicas_the_same(program):
    runs(program, """
    import warnings
    import torch.distributed.tensor as dt
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("error")  # torch's, that random operators are not complete on such a mesh
    mesh = init_device_mesh("cuda", (2,))

    def shards(whole):
        return whole.full_tensor().chunk(2)

    def everywhere(tensor):
        found = [torch.empty_like(tensor), torch.empty_like(tensor)]
        dist.all_gather(found, tensor)
        return torch.equal(*found)

    torch.manual_seed(rank)  # as on CUDA, all go on from the first one's state
    first = dt.rand(64, 64, device_mesh=mesh, placements=[dt.Shard(0)])
    a, b = shards(first)
    assert not (a == b).any() and everywhere(first.full_tensor())
    assert 0.45 < first.full_tensor().mean() < 0.55
    torch.manual_seed(0)
    assert torch.equal(dt.rand(64, 64, device_mesh=mesh, placements=[dt.Shard(0)]).full_tensor(), first.full_tensor())
    assert everywhere(dt.randn(8, device_mesh=mesh, placements=[dt.Replicate()]).to_local())
    assert everywhere(torch.rand(8, device=device))  # the generators are where they were together

    with torch.device("meta"):
        layer = nn.Linear(16, 64)
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cuda")
    layer.reset_parameters()
    a, b = shards(layer.weight)
    assert not (a == b).any() and a.abs().max() <= 0.25 and b.abs().max() <= 0.25

    ones = dt.distribute_tensor(torch.ones(64, 64, device=device), mesh, [dt.Shard(1)])
    kept = torch.nn.functional.dropout(ones, 0.25).full_tensor() > 0
    assert not torch.equal(kept[:, :32], kept[:, 32:]) and 0.7 < kept.float().mean() < 0.8

    generator = torch.Generator("cuda").manual_seed(5)
    given = dt.distribute_tensor(torch.zeros(2, 16, device=device), mesh, [dt.Shard(0)]).uniform_(generator=generator)
    again = dt.distribute_tensor(torch.zeros(2, 16, device=device), mesh, [dt.Shard(0)]).uniform_(generator=generator)
    a, b = shards(given)
    assert not (a == b).any() and not torch.equal(given.full_tensor(), again.full_tensor())
    dt._random.manual_seed(3, mesh)
    assert dt._random._rng_tracker.distribute_region_enabled
    """)  # fmt: skip


@pytest.fixture
def program_of_one():
    with hal.adopt("cpu"):
        yield importlib.import_module("torch")


def test_attention_on_distributed_tensors_is_sharded_as_on_cuda(program):
    runs(
        program,
        """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    attend, mesh = nn.functional.scaled_dot_product_attention, init_device_mesh("cuda", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(2, 4, 16, 8, device=device, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 4, 16, 8, device=device)
    expected = attend(*whole, is_causal=True)
    grads = torch.autograd.grad(expected, whole, upstream)
    for place in (Shard(0), Shard(1), Replicate()):
        parts = [distribute_tensor(x.detach(), mesh, [place]).requires_grad_() for x in whole]
        found = attend(*parts, is_causal=True)
        assert found.placements == (place,)
        assert torch.equal(found.full_tensor(), expected)
        mine = torch.autograd.grad(found, parts, distribute_tensor(upstream, mesh, [place]))
        assert all(torch.equal(a.full_tensor(), b) for a, b in zip(mine, grads)), place
        for shape in (16, 16), (1, 1, 16, 16), (2, 1, 16, 16), (1, 4, 16, 16), (2, 4, 16, 16):
            mask = torch.rand(shape, device=device) > 0.3
            mask[..., 0] = True
            dist.broadcast(mask, 0)
            for plain in mask, mask.float().log():
                given = distribute_tensor(plain, mesh, [Replicate()])
                found, expected_here = attend(*parts, attn_mask=given), attend(*whole, attn_mask=plain)
                assert torch.equal(found.full_tensor(), expected_here), (place, shape)
                mine = torch.autograd.grad(found, parts, distribute_tensor(upstream, mesh, [place]))
                theirs = torch.autograd.grad(expected_here, whole, upstream)
                assert all(torch.equal(a.full_tensor(), b) for a, b in zip(mine, theirs)), (place, shape)
    """,
    )


def test_a_release_forgets_how_a_cpus_attention_is_sharded():
    code = """
        import hal, torch
        from torch.distributed.tensor import DTensor
        known = DTensor._op_dispatcher.sharding_propagator
        before = set(known.op_strategy_funcs), set(known.op_to_schema_info)
        with hal.adopt("cpu"):
            assert len(known.op_strategy_funcs) == len(before[0]) + 2
        assert (set(known.op_strategy_funcs), set(known.op_to_schema_info)) == before
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [{}, {"device_ids": [0], "output_device": 0}, {"device_ids": ["cuda:0"]}])
def test_data_parallel_says_which_devices_it_has(given, program_of_one):
    t = program_of_one
    layer = t.nn.Linear(2, 3).cpu()
    wrapped = t.nn.DataParallel(layer, **given)
    assert layer.weight.is_cuda  # moved there, as on CUDA with one device
    stream = io.BytesIO()
    t.save(wrapped, stream)
    stream.seek(0)
    for each in (
        wrapped,
        copy.deepcopy(wrapped),
        pickle.loads(pickle.dumps(wrapped)),
        t.load(stream, weights_only=False),
    ):
        assert each.device_ids == [0]
        assert (each.output_device, each.dim, each.src_device_obj) == (0, 0, t.device("cuda:0"))
        assert list(each.state_dict()) == ["module.weight", "module.bias"]
        assert each(t.ones(4, 2)).shape == (4, 3)
        assert each(t.ones(4, 2, device="cuda")).is_cuda
    assert t.nn.DataParallel(layer, output_device=-1).output_device == -1
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        t.nn.DataParallel(layer, device_ids=[0, 1])
    compiled = t.compile(wrapped, backend="eager")
    assert compiled(t.ones(4, 2, device="cuda")).shape == (4, 3)

    class Own(t.nn.DataParallel):
        def forward(self, *inputs, **kwargs):
            scattered, kwargs = self.scatter(inputs, kwargs, self.device_ids)
            return self.module(*scattered[0], **kwargs[0])

    x = t.ones(4, 2, device="cuda", requires_grad=True)
    Own(layer)(x).sum().backward()
    assert x.grad.shape == (4, 2)
    whole = wrapped.gather([t.ones(2, device="cuda"), t.zeros(1, device="cuda")], wrapped.output_device)
    assert whole.tolist() == [1, 1, 0]
    assert t.nn.parallel.data_parallel(layer, t.ones(4, 2, device="cuda"), **given).shape == (4, 3)
    assert wrapped.gather([t.tensor(1.0, device="cuda"), t.tensor(2.0, device="cuda")], 0).tolist() == [1, 2]


def test_a_data_parallel_model_works_on_after_a_release():
    with hal.adopt("cpu"):
        wrapped = importlib.import_module("torch").nn.DataParallel(torch.nn.Linear(2, 3))
    assert wrapped.device_ids == []
    assert wrapped(torch.ones(4, 2)).shape == (4, 3)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "RMSprop", "Rprop"])
@pytest.mark.parametrize("foreach", [True, False])
def test_an_optimiser_that_a_graph_could_capture_trains(kind, foreach, program_of_one):
    layer = program_of_one.nn.Linear(3, 2).cuda()
    before = layer.weight.detach().clone()
    optimizer = getattr(program_of_one.optim, kind)(layer.parameters(), capturable=True, foreach=foreach)
    for _ in range(2):
        optimizer.zero_grad()
        layer(program_of_one.ones(2, 3, device="cuda")).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, layer.weight)


def test_an_averaged_model_is_made_on_cuda(program_of_one):
    averaged = program_of_one.optim.swa_utils.AveragedModel(program_of_one.nn.Linear(2, 2), device="cuda")
    assert next(averaged.parameters()).is_cuda
    assert averaged.n_averaged.is_cuda


def test_a_release_puts_the_classes_back():
    import torch.distributed.fsdp._init_utils as sharded

    parallel, norm, adam = (
        torch.nn.parallel.DistributedDataParallel,
        torch.nn.SyncBatchNorm,
        sys.modules["torch.optim.adam"],
    )
    owners = (
        sys.modules["torch.nn.parallel.scatter_gather"],
        parallel,
        torch.nn.DataParallel,
        norm,
        adam,
        sharded,
        torch.cpu.Stream,
        torch.distributed.DeviceMesh,
        torch.distributed.ProcessGroup,
    )
    before = [dict(vars(owner)) for owner in owners]
    with hal.adopt("cpu"):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
