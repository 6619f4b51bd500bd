# SPDX-License-Identifier: Apache-2.0
"""What crosses between host and device on a CPU is copied as CUDA copies it: neither side follows the other."""

import copy
import importlib
import io
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
import torch

import hal


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


MOVES = {
    "to": lambda t, x: x.to("cuda"),
    "to, by keyword": lambda t, x: x.to(device="cuda", non_blocking=True),
    "to another": lambda t, x: x.to(t.ones(1, device="cuda")),
    "cuda": lambda t, x: x.cuda(),
    "type": lambda t, x: x.type("torch.cuda.FloatTensor"),
    "type_as": lambda t, x: x.type_as(t.ones(1, device="cuda")),
    "as_tensor": lambda t, x: t.as_tensor(x, device="cuda"),
    "asarray": lambda t, x: t.asarray(x, device="cuda"),
    "a storage": lambda t, x: t.empty(0, device="cuda").set_(x.untyped_storage().cuda(), 0, (3,)),
}
SOURCES = {
    "made on the host": lambda t: t.ones(3),
    "computed on the host": lambda t: t.ones(3) * 1,
    "stacked on the host": lambda t: t.stack([t.ones(3) for _ in range(2)])[0],
    "from numpy": lambda t: t.from_numpy(np.ones(3, dtype=np.float32)),
    "of a module that was not moved": lambda t: t.nn.BatchNorm1d(3).weight.detach(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_move_to_the_device_is_a_copy(move, source, cuda):
    host = SOURCES[source](cuda.torch)
    device = MOVES[move](cuda.torch, host)
    device.mul_(7)
    assert device.is_cuda
    assert device.tolist() == [7, 7, 7]
    assert host.tolist() == [1, 1, 1]


@pytest.mark.parametrize("made", [
    lambda t: t.ones(3, device="cuda"), lambda t: t.ones(3).cuda(), lambda t: (t.ones(3) * 2).to("cuda"),
    lambda t: t.zeros_like(t.ones(3, device="cuda")), lambda t: t.ones(3, device="cuda").new_zeros(2),
    lambda t: t.ones(3, device="cuda").view(3, 1), lambda t: t.nn.Linear(2, 2).cuda().weight,
    lambda t: t.nn.Linear(2, 2, device="cuda").weight, lambda t: t.as_tensor([1.0], device="cuda"),
    lambda t: t.as_tensor(np.ones(2), device="cuda"), lambda t: (t.ones(3) * 2).to(t.ones(1, device="cuda")),
])  # fmt: skip
def test_a_move_of_what_is_known_to_be_on_the_device_is_none(made, cuda):
    x = made(cuda.torch)
    assert x.to("cuda") is x
    assert x.cuda() is x
    assert x.to(x) is x
    assert cuda.torch.as_tensor(x, device="cuda") is x
    assert cuda.torch.as_tensor(x).is_cuda


def test_a_leaf_of_autograd_stays_the_leaf_that_an_optimizer_takes(cuda):
    t = cuda.torch
    weight = t.nn.Parameter(t.randn(3, device="cuda") * 0.1)
    moved = weight.to("cuda")
    assert moved is weight
    t.optim.SGD([moved], lr=1.0)
    # Gradients go through a copy.
    x = t.ones(3, requires_grad=True)
    (x * 2).to("cuda").sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_arrays_are_copied_to_the_device_and_shared_on_the_host(cuda):
    for make in (cuda.torch.as_tensor, cuda.torch.asarray):
        array = np.ones(3)
        make(array, device="cuda").add_(1)
        assert array.tolist() == [1, 1, 1]
        make(array).add_(1)
        assert array.tolist() == [2, 2, 2]


def test_a_tensor_taken_without_a_device_stays_where_it_is(cuda):
    for make in (cuda.torch.as_tensor, cuda.torch.asarray):
        x, h = cuda.torch.ones(2, device="cuda"), cuda.torch.ones(2)
        assert make(x) is x
        assert x.is_cuda
        assert not make(h).is_cuda
        with cuda.torch.device("cuda"):
            assert make(h).is_cuda
        assert not h.is_cuda


SNAPSHOTS = {
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(force=True),
    "detached": lambda x: x.detach().cpu().numpy(),
    "a storage": lambda x: torch.empty(0).set_(x.untyped_storage().cpu(), 0, (2,)),
    "a tree": lambda x: torch.utils._pytree.tree_map(lambda y: y.cpu(), {"x": x})["x"],
    "torch's own": lambda x: _offload({"x": x})["x"],
}


def _offload(states):
    from torch.distributed._state_dict_utils import _offload_state_dict_to_cpu

    return _offload_state_dict_to_cpu(states)


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
@pytest.mark.parametrize("made", ["torch.ones(2, device='cuda')", "torch.ones(2, device='cuda') * 1"])
def test_a_snapshot_on_the_host_does_not_follow_the_device(snapshot, made, cuda):
    x = eval(made, {"torch": cuda.torch})
    kept = SNAPSHOTS[snapshot](x)
    x.add_(1)
    assert kept.tolist() == [1, 1]
    if isinstance(kept, torch.Tensor):
        assert not kept.is_cuda


def test_a_module_that_moves_leaves_what_it_was_behind(cuda):
    layer = cuda.torch.nn.BatchNorm1d(2)
    parameter, before = layer.weight, layer.state_dict()
    layer.cuda()
    assert layer.weight is parameter
    layer(cuda.torch.full((4, 2), 3.0, device="cuda") + 1).sum().backward()
    with cuda.torch.no_grad():
        layer.weight.fill_(5)
    assert before["weight"].tolist() == [1, 1]
    assert before["running_mean"].tolist() == [0, 0]
    best = layer.cpu().state_dict()
    assert not any(tensor.is_cuda for tensor in (layer.weight, layer.weight.grad, layer.running_mean))
    layer.cuda()
    assert all(tensor.is_cuda for tensor in (layer.weight, layer.weight.grad, layer.running_mean))
    with cuda.torch.no_grad():
        layer.weight.fill_(6)
    assert best["weight"].tolist() == [5, 5]
    data = layer.weight.data_ptr()
    assert layer.to("cuda:0").cuda().weight.data_ptr() == data  # there already


def test_tied_weights_stay_tied_when_they_move(cuda):
    t = cuda.torch
    model = t.nn.Sequential(t.nn.Linear(2, 2), t.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.cuda().cpu().cuda()
    assert model[1].weight is model[0].weight
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


def test_lazy_modules_move(cuda):
    t = cuda.torch
    for layer in (t.nn.LazyLinear(3).to("cuda"), t.nn.LazyLinear(3).cuda(), t.nn.LazyLinear(3).cpu().cuda()):
        assert layer(t.ones(1, 2, device="cuda")).is_cuda
        assert layer.weight.is_cuda


def test_empty_modules_are_where_they_were_wanted(cuda):
    t = cuda.torch
    for device, on_cuda in (("cuda", True), (0, True), (t.device("cuda"), True), ("cpu", False)):
        layer = t.nn.Linear(2, 2, device="meta").to_empty(device=device)
        assert layer.weight.is_cuda == on_cuda


def test_numpys_integers_are_indices_of_devices(cuda):
    t = cuda.torch
    for zero in (np.int64(0), np.int32(0)):
        assert t.ones(2).to(zero).is_cuda
        assert t.ones(2).cuda(zero).is_cuda
        assert t.ones(2, device=zero).is_cuda
        assert t.nn.Linear(2, 2).to(zero).weight.is_cuda
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            t.ones(2).to(zero + 4)


def test_pinned_memory_is_the_hosts(cuda):
    t = cuda.torch
    x = t.ones(2, device="cuda")
    for made in (
        t.empty(2, pin_memory=True), t.zeros(2, pin_memory=True), t.tensor([1.0], pin_memory=True),
        t.randn(2, device="cpu", pin_memory=True), t.empty_like(x, device="cpu", pin_memory=True),
        x.new_empty(2, device="cpu", pin_memory=True),
    ):  # fmt: skip
        assert not made.is_cuda
    for make in (t.zeros, x.new_empty):
        with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
            make(2, device="cuda", pin_memory=True)


def test_pinned_memory_is_a_copy(cuda):
    t = cuda.torch
    read, batches = np.zeros(2, np.float32), []
    for step in range(3):  # one array to read into, again and again
        read[:] = step
        batches.append(t.from_numpy(read).pin_memory())
    assert [batch.cuda()[0].item() for batch in batches] == [0.0, 1.0, 2.0]
    assert all(batch.is_pinned() and batch.pin_memory() is batch and not batch.is_cuda for batch in batches)
    assert t.empty(2, pin_memory=True).is_pinned()
    assert not t.ones(2).is_pinned()
    with pytest.raises(RuntimeError, match=r"cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors"):
        t.ones(2, device="cuda").pin_memory()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_pins_gives_copies(cuda, workers):
    t = cuda.torch
    data = t.arange(4.0).view(2, 2)
    loader = t.utils.data.DataLoader(data, batch_size=None, pin_memory=True, num_workers=workers)
    assert loader.pin_memory
    for batch in loader:
        assert batch.is_pinned()
        batch += 100.0
    assert data.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_what_is_written_into_stays_where_it_is(cuda):
    t = cuda.torch
    for make in (t.rand, t.randn, t.zeros, t.ones, t.empty, t.randperm, lambda n, out: t.arange(float(n), out=out),
                 lambda n, out: t.linspace(0, 1, n, out=out), lambda n, out: t.normal(0.0, 1.0, (n,), out=out),
                 lambda n, out: t.full((n,), 1.0, out=out)):  # fmt: skip
        for device in ("cuda", "cpu"):
            into = t.empty(2, device=device, dtype=t.long if make is t.randperm else t.float)
            assert make(2, out=into).is_cuda == into.is_cuda == (device == "cuda")


def test_modules_that_hold_a_number_are_made_on_the_device(cuda):
    t = cuda.torch
    for device in ("cuda", t.device("cuda"), "cuda:0"):
        for layer in (t.nn.BatchNorm2d(2, device=device), t.nn.SyncBatchNorm(2, device=device),
                      t.nn.LazyBatchNorm1d(device=device),
                      t.nn.InstanceNorm1d(2, track_running_stats=True, device=device)):  # fmt: skip
            assert layer.running_mean.is_cuda
            assert layer.num_batches_tracked.is_cuda
    assert t.nested.as_nested_tensor([t.ones(2)], layout=t.jagged, device="cuda").is_cuda


def test_an_optimizers_state_is_loaded_to_where_its_parameters_are(cuda):
    t = cuda.torch
    layer = t.nn.Linear(2, 2).cuda()
    optimizer = t.optim.Adam(layer.parameters())
    layer(t.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    t.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = t.load(file, map_location="cpu")
    before = copy.deepcopy(loaded)
    optimizer.load_state_dict(loaded)
    assert optimizer.state[layer.weight]["exp_avg"].is_cuda
    optimizer.step()
    assert not loaded["state"][0]["exp_avg"].is_cuda
    assert loaded["state"][0]["exp_avg"].equal(before["state"][0]["exp_avg"])


def test_what_is_loaded_is_where_it_was_wanted(cuda, tmp_path):
    t = cuda.torch
    file = tmp_path / "state.pt"
    t.save({"x": t.ones(3, device="cuda")}, file)
    for where, on_cuda in (
        ({"cuda:0": "cuda:0"}, True), ({"cuda:0": "cpu"}, False), ({"cuda:1": "cuda:0"}, True), ({"cpu": "cpu"}, False),
        (lambda storage, _: storage.cuda(), True), (lambda storage, _: storage.cuda(0), True),
        (lambda storage, _: storage.cpu(), False), ("cuda", True),
    ):  # fmt: skip
        x = t.load(file, map_location=where)["x"]
        assert x.is_cuda == on_cuda
        assert x.tolist() == [1, 1, 1]
        assert x.untyped_storage().is_cuda == on_cuda
        assert x.untyped_storage().device.type == x.device.type
    url = file.as_uri()
    for where, on_cuda in (("cuda", True), ("cpu", False)):
        x = t.hub.load_state_dict_from_url(url, str(tmp_path / "cache"), map_location=where, progress=False)["x"]
        assert x.is_cuda == on_cuda


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_a_saved_script_is_loaded_to_where_it_is_wanted(cuda, tmp_path):
    t = cuda.torch
    file = str(tmp_path / "script.pt")
    t.jit.save(t.jit.trace(t.nn.Linear(2, 2).cuda(), t.ones(1, 2, device="cuda")), file)
    for where, on_cuda in (("cuda", True), (t.device("cuda", 0), True), ("cpu", False)):
        assert t.jit.load(file, map_location=where).weight.is_cuda == on_cuda


class Model(torch.nn.Module):
    """Remembers where its input was."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        self.seen = x.is_cuda
        return self.layer(x) + self.buffer


@pytest.fixture
def group(cuda, tmp_path):
    """A group of one process."""
    cuda.torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    cuda.torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_move_their_inputs_and_their_buffers(cuda, group):
    t = cuda.torch
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def model():
        made = Model()
        made.register_buffer("buffer", t.zeros(2))
        return made

    for wrap in (
        lambda: t.nn.DataParallel(model().cuda()),
        lambda: t.nn.parallel.DistributedDataParallel(model().cuda(), device_ids=[0]),
        lambda: FullyShardedDataParallel(model(), device_id=0),
        lambda: fully_shard(model()),
    ):
        wrapped = wrap()
        inner, x = getattr(wrapped, "module", wrapped), t.ones(2, 2)
        wrapped(x)
        assert inner.seen
        assert inner.buffer.is_cuda
        assert not x.is_cuda
    wrapped = t.nn.parallel.DistributedDataParallel(model().cpu())
    wrapped(t.ones(2, 2))
    assert not wrapped.module.seen


def test_a_whole_state_that_is_kept_on_the_host_does_not_follow_the_training(cuda):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    layer = cuda.torch.nn.Linear(2, 2).cuda()
    state = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    before = state["weight"].clone()
    with torch.no_grad():
        layer.weight.add_(1)
    assert not state["weight"].is_cuda
    assert state["weight"].equal(before)


def test_a_side_is_that_of_the_memory_and_of_the_adoption_that_knows_it():
    with hal.adopt("cpu"):
        t = importlib.import_module("torch")
        host = t.ones(3)
        view = host[1:]
        del host
        assert not view.detach().is_cuda
        assert t.ones(2).to("cuda").is_cuda
    with hal.adopt("cpu"):
        assert view.is_cuda  # nothing is known of it now
    assert view.device.type == "cpu"
    assert not view.is_cuda


def test_files_of_safetensors_are_opened_on_either_side(cuda, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = tmp_path / "cuda.safetensors"
    save_file({"x": cuda.torch.ones(3, device="cuda")}, file)
    # Names that this module imported while a device was adopted are those that a program gets.
    for device, on_cuda in (("cuda", True), ("cuda:0", True), (0, True), ("cpu", False)):
        assert load_file(file, device=device)["x"].is_cuda == on_cuda
        with safe_open(file, framework="pt", device=device) as opened:
            assert list(opened.keys()) == ["x"]
            assert opened.get_tensor("x").is_cuda == on_cuda
            assert opened.get_slice("x")[:2].is_cuda == on_cuda
            assert opened.get_slice("x").get_shape() == [3]
    assert not load_file(file)["x"].is_cuda
    with safe_open(file, framework="np") as opened:
        assert opened.get_tensor("x").tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        load_file(file, device="cuda:4")


@pytest.mark.parametrize("first", ["safetensors.torch", "hal"])
def test_safetensors_may_be_loaded_before_a_device_is_adopted_or_later(tmp_path, first):
    code = f"""
    import {first}
    import hal, torch
    with hal.adopt("cpu"):
        import safetensors, safetensors.torch
        safetensors.torch.save_file({{"x": torch.ones(3, device="cuda")}}, "x.safetensors")
        assert safetensors.torch.load_file("x.safetensors", device="cuda")["x"].is_cuda
        with safetensors.safe_open("x.safetensors", framework="pt", device="cuda:0") as opened:
            assert opened.get_tensor("x").is_cuda
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path, timeout=240)


def test_safetensors_is_its_own_after_a_release():
    import safetensors.torch

    own = safetensors.safe_open
    with hal.adopt("cpu"):
        assert safetensors.torch.safe_open is not own
        assert vars(sys.modules["safetensors"])["safe_open"] is own  # what stands in for it calls it there
    assert safetensors.safe_open is safetensors.torch.safe_open is own


def test_what_torch_fx_traces_has_no_more_in_its_graph_than_the_program_calls(cuda):
    t = cuda.torch
    import torch.fx as fx

    host = t.ones(2)

    def made(x):
        return t.zeros_like(x) + t.ones_like(x) + t.zeros(2, device="cuda").to(x) + x.to(host)

    # As if nobody had asked yet which methods tensors have: torch collects them once.
    for collected in (torch.overrides._get_tensor_methods, torch.overrides._get_overridable_functions):
        collected.cache_clear()
    nodes = [node.op for node in fx.symbolic_trace(made).graph.nodes]
    assert nodes.count("call_method") == 1 + 1  # x.to(host), and to(x) of what was made
    assert nodes.count("call_function") == 2 + 3  # the two that make tensors of x, and three sums


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # once in a process
def test_packed_sequences_and_typed_storages_say_where_they_are_and_move(cuda):
    t = cuda.torch
    from torch.nn.utils.rnn import pack_sequence

    packed = pack_sequence([t.ones(3), t.ones(2)], enforce_sorted=False)
    device, again = packed.cuda(), packed.cuda(0)
    assert device.is_cuda
    assert again.is_cuda
    assert not device.cpu().is_cuda
    device.cpu().data.zero_()
    assert device.data.sum() == 5
    assert device.cpu().sorted_indices.device.type == "cpu"
    host = t.ones(1)
    for there in ("cpu", host.device, host):
        moved = device.to(there)
        assert not moved.is_cuda
        assert moved.data.device == moved.sorted_indices.device == host.device
        assert moved.to(there) is moved
        moved.data.zero_()
        assert device.data.sum() == 5
    assert not device.to(device="cpu", dtype=t.float64).is_cuda
    for there in ("cuda", 0, device.data):
        back = moved.to(there)
        assert back.is_cuda
        assert back.unsorted_indices.is_cuda
        assert back.to(there) is back
        back.data.fill_(1)
        assert moved.data.sum() == 0
    assert back.double().is_cuda
    assert t.ones(2, device="cuda").storage().device == t.device("cuda:0")
    assert t.ones(2, device="cuda").storage().is_cuda
    assert not t.ones(2).storage().is_cuda


def test_a_module_takes_the_typed_tensors_of_old(cuda):
    t = cuda.torch
    layer = t.nn.Linear(2, 2)
    assert layer.type(t.cuda.HalfTensor).weight.dtype is t.float16
    assert layer.type("torch.cuda.DoubleTensor").weight.is_cuda
    assert layer.weight.dtype is t.float64
    compiled = t.compile(lambda x: x.type("torch.cuda.HalfTensor") if x.type() == "torch.cuda.FloatTensor" else x,
                         backend="eager", fullgraph=True)  # fmt: skip
    assert compiled(t.ones(2, device="cuda")).dtype is t.float16
