# SPDX-License-Identifier: Apache-2.0
"""A program's view of CUDA while a CPU is adopted, and torch as it was afterwards."""

import functools
import importlib
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import hal
from hal.errors import ConfigError, UnknownDevice, UnsupportedOperation
from hal.launch.adoption import adopted


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


def entries(cuda, kind):
    """What was counted, by API."""
    return {entry.api: entry for entry in cuda.adoption.entries() if entry.kind == kind}


# What a program sees -------------------------------------------------------------------------------------------------


def test_a_tensor_made_on_cuda_says_so_by_every_name(cuda):
    x = cuda.torch.zeros(3, device="cuda")
    assert x.device == torch.device("cuda", 0)
    assert x.device.type == "cuda"
    assert "cuda" in str(x.device)
    assert x.is_cuda
    assert x.get_device() == cuda.torch.get_device(x) == 0
    assert x.type() == "torch.cuda.FloatTensor"
    assert isinstance(x, cuda.torch.cuda.FloatTensor)
    assert not isinstance(x, cuda.torch.cuda.LongTensor)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), 0])
def test_every_form_of_a_device_is_understood(cuda, device):
    assert cuda.torch.ones(2, device=device).is_cuda
    assert cuda.torch.ones(2).to(device).is_cuda
    assert cuda.torch.ones(2).to(device=device).is_cuda
    assert cuda.torch.ones(2).cuda(device).is_cuda
    assert cuda.torch.nn.Linear(2, 2).to(device).weight.is_cuda
    assert cuda.torch.ones(2).new_zeros(2, device=device).is_cuda
    assert cuda.torch.ones(2, device=device).new(2, device=device).new([1.0]).is_cuda
    there = cuda.torch.ones(2, device=device)
    assert cuda.torch.ones(2).new(there).is_cuda  # the same memory
    assert there.is_cuda
    assert cuda.torch._C._nn._parse_to(there)[0].type == "cuda"
    assert cuda.torch._C._nn._parse_to(cuda.torch.ones(2))[0].type == "cpu"
    for parsed in (cuda.torch._C._nn._parse_to(device), cuda.torch._C._nn._parse_to(device=device)):
        assert parsed[0].type == "cuda"  # which libraries ask that have a `to` of their own


def test_every_maker_of_tensors_takes_cuda(cuda):
    t = cuda.torch
    made = [
        t.tensor([1.0], device="cuda"), t.as_tensor([1.0], device="cuda"), t.empty(2, device="cuda"),
        t.arange(3, device="cuda"), t.linspace(0, 1, 3, device="cuda"), t.eye(2, device="cuda"),
        t.full((2,), 1.0, device="cuda"), t.rand(2, device="cuda"), t.randint(5, (2,), device="cuda"),
        t.randperm(4, device="cuda"), t.zeros_like(t.ones(2), device="cuda"), t.normal(0.0, 1.0, (2,), device="cuda"),
        t.fft.fftfreq(4, device="cuda"), t.tril_indices(2, 2, device="cuda"), t.hann_window(4, device="cuda"),
        t.asarray([1.0], device="cuda"), t.empty_strided((2,), (1,), device="cuda"),
        t.sparse_coo_tensor([[0]], [1.0], (2,), device="cuda", check_invariants=True).to_dense(), t.logspace(0, 1, 3, device="cuda"),
    ]  # fmt: skip
    assert all(x.is_cuda for x in made)


def test_torchs_own_modules_take_cuda_too(cuda):
    layer = torch.nn.Linear(3, 2, device="cuda")  # hands the device to torch.empty, deep in torch
    assert layer.weight.is_cuda
    assert torch.nn.MultiheadAttention(4, 2, device=torch.device("cuda", 0)).in_proj_weight.is_cuda
    assert layer.to_empty(device="cuda").weight.is_cuda


def test_default_devices_are_understood(cuda):
    with cuda.torch.device("cuda"):
        assert cuda.torch.ones(2).is_cuda
        assert torch.nn.Linear(2, 2).weight.is_cuda
    assert not cuda.torch.ones(2).is_cuda
    cuda.torch.set_default_device("cuda")
    try:
        assert cuda.torch.ones(2).is_cuda
        assert cuda.torch.get_default_device().type == "cuda"
    finally:
        cuda.torch.set_default_device(None)
    assert not cuda.torch.ones(2).is_cuda


def test_a_default_device_takes_arrays_as_cuda_does_and_leaves_what_shares_their_memory(cuda):
    array = np.zeros(3, dtype=np.float32)
    with cuda.torch.device("cuda"):
        for make in (cuda.torch.as_tensor, cuda.torch.asarray):
            made = make(array)
            made += 1
            assert made.is_cuda
            assert array.tolist() == [0, 0, 0]
        for make in (cuda.torch.from_numpy, lambda a: cuda.torch.frombuffer(a, dtype=torch.float32)):
            host = make(array)
            assert not host.is_cuda
            moved = host.to("cuda")
            moved += 1
            assert array.tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_module_that_moves_its_input_is_traced(cuda):
    class Moves(torch.nn.Module):
        def forward(self, x):
            return x.to("cuda") * 2

    x = cuda.torch.ones(2)
    exec("def traced(torch, module, x): return torch.jit.trace(module, x)", names := {"__name__": "program"})
    assert names["traced"](cuda.torch, Moves(), x)(x).tolist() == [2, 2]


@pytest.mark.parametrize("kind", ["torch.FloatTensor", torch.FloatTensor, "torch.DoubleTensor"])
def test_a_type_of_the_hosts_moves_to_the_host(cuda, kind):
    x = cuda.torch.zeros(3, device="cuda")
    host = x.type(kind)
    host += 1
    assert not host.is_cuda
    assert x.tolist() == [0, 0, 0]
    assert x.type(torch.float64).is_cuda


def test_host_tensors_are_told_apart_where_they_can_be(cuda):
    host = cuda.torch.ones(4)
    assert host.device.type == "cpu"
    assert not host.is_cuda
    assert host.get_device() == -1
    assert host.type() == "torch.FloatTensor"
    assert not host[1:].is_cuda  # a view
    assert not cuda.torch.from_numpy(host.numpy()).is_cuda
    on_device = host.cuda()
    assert on_device.is_cuda
    assert not host.is_cuda
    assert not on_device.cpu().is_cuda
    assert not on_device.to("cpu").is_cuda
    assert not cuda.torch.zeros_like(host).is_cuda
    assert cuda.torch.zeros_like(on_device).is_cuda
    assert host.to(on_device).is_cuda
    assert not on_device.to(host).is_cuda


def test_crossing_between_host_and_device_copies_as_on_cuda(cuda):
    host = cuda.torch.ones(2)
    device = host.to("cuda")
    snapshot = {"w": device.cpu()}
    device.add_(1)
    assert host.tolist() == [1, 1]
    assert snapshot["w"].tolist() == [1, 1]
    assert device.tolist() == [2, 2]
    assert device.to("cuda") is device
    assert host.cpu() is host


def test_modules_say_where_they_are(cuda):
    layer = cuda.torch.nn.Linear(2, 2)
    parameter = layer.weight
    assert layer.cuda().weight is parameter
    assert parameter.is_cuda
    assert not layer.cpu().weight.is_cuda
    assert layer.to("cuda", torch.float64).weight.dtype == torch.float64
    assert layer.weight.is_cuda


def test_torchs_own_modules_see_the_truth(cuda):
    x = cuda.torch.zeros(2, device="cuda")
    code = compile("seen = x.device", "<torch>", "exec")
    inside, outside = {"__name__": "torch.nn.functional", "x": x}, {"__name__": "torchvision.ops", "x": x}
    exec(code, inside)
    exec(code, outside)
    assert inside["seen"].type == "cpu"
    assert outside["seen"].type == "cuda"
    assert not sys.modules["torch"].cuda.is_available() or torch.version.cuda


def test_there_are_as_many_devices_as_are_told(cuda):
    assert cuda.torch.cuda.device_count() == 1
    assert cuda.torch.cuda.is_available()
    for ask in (
        lambda: cuda.torch.zeros(1, device="cuda:1"), lambda: cuda.torch.ones(1).cuda(1),
        lambda: cuda.torch.cuda.set_device(3), lambda: cuda.torch.cuda.get_device_name(2),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"invalid device ordinal.*cuda:0 only"):
            ask()


def test_the_current_device_is_one_for_each_thread(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with hal.adopt("cpu"):
        t = importlib.import_module("torch")
        t.cuda.set_device(1)
        assert t.cuda.current_device() == 1
        assert t.zeros(1, device="cuda").device.index == 1
        seen = []
        thread = threading.Thread(target=lambda: seen.append(t.cuda.current_device()))
        thread.start()
        thread.join()
        assert seen == [0]
        with t.cuda.device(0):
            assert t.cuda.current_device() == 0
        assert t.cuda.current_device() == 1


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_are_made_on_the_device(cuda):
    t = cuda.torch
    for device in ("cuda", "cuda:0", t.device("cuda"), 0):
        made = t.UntypedStorage(16, device=device)
        assert (made.device, made.nbytes()) == (torch.device("cuda", 0), 16)
    assert t.empty(0, device="cuda").set_(made).is_cuda
    for made in (t.UntypedStorage(8), t.UntypedStorage([1, 2]), t.UntypedStorage(8, device="cpu")):
        assert made.device == torch.device("cpu")
    typed = t.TypedStorage([1.0, 2.0], dtype=t.float32, device="cuda")
    assert (typed.device.type, list(typed)) == ("cuda", [1.0, 2.0])
    with t.device("cuda"):
        assert t.UntypedStorage(4).device.type == "cpu"  # torch's mode of a default device does not reach it


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_are_of_a_type_and_a_device(cuda, tmp_path):
    t = cuda.torch
    there, host = t.ones(2, device="cuda"), t.ones(2)
    for made in (there.storage(), t.cuda.FloatStorage(2), t.cuda.FloatStorage([1.0, 1.0]), host.cuda().storage()):
        assert made.type() == "torch.cuda.FloatStorage"
        assert made.is_cuda
        assert made.get_device() == made.untyped().get_device() == 0
        assert isinstance(made, t.cuda.FloatStorage)
        assert isinstance(made, t.TypedStorage)
        assert not isinstance(made, (t.FloatStorage, t.cuda.DoubleStorage))
    for made in (host.storage(), there.cpu().storage(), t.FloatStorage(2), t.TypedStorage([1.0], dtype=t.float32)):
        assert made.type() == "torch.FloatStorage"
        assert made.get_device() is made.untyped().get_device() is None  # as torch's own
        assert not made.is_cuda
        assert isinstance(made, t.FloatStorage)
        assert not isinstance(made, t.cuda.FloatStorage)
    assert t.ones(2, device="cuda").double().storage().type() == "torch.cuda.DoubleStorage"
    file = tmp_path / "numbers"
    file.write_bytes(bytes(8))
    for made in (t.FloatStorage.from_file(str(file), True, 2), t.FloatStorage.from_buffer(bytes(8), "native")):
        assert (made.type(), made.device.type) == ("torch.FloatStorage", "cpu")
        assert isinstance(made, t.FloatStorage)
    copy = there.storage().cpu()
    assert (copy.type(), copy.device.type) == ("torch.FloatStorage", "cpu")
    copy.fill_(7)
    assert there.tolist() == [1.0, 1.0]


def test_a_warning_stands_under_the_programs_line(cuda):
    shows = warnings._showwarnmsg
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cuda.torch.range(0, 3, device="cuda"), torch.tensor(cuda.torch.ones(2))  # one of C++'s, one of another's call
        cuda.torch.tensor(cuda.torch.ones(2))
        cuda.torch.cuda.amp.autocast()
    assert len(seen) == 4
    assert {warning.filename for warning in seen} == {__file__}
    line = seen[0].lineno
    assert [warning.lineno - line for warning in seen] == [0, 0, 1, 2]
    hal.release()
    assert warnings._showwarnmsg is not shows


def test_a_future_takes_devices(cuda):
    t, kind = cuda.torch, cuda.torch.futures.Future
    for devices in (None, [], ["cuda"], ["cuda:0"], [0], [t.device("cuda", 0), "cuda:0"]):
        future = kind(devices=devices)
        assert isinstance(future, kind)
        doubled = future.then(lambda done: done.value() * 2)
        future.set_result(t.ones(2, device="cuda"))
        assert doubled.wait().tolist() == [2, 2]
        assert doubled.wait().is_cuda
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        kind(devices=["cuda:7"])
    with pytest.raises(ValueError, match="device"):
        kind(devices=["cpu"])  # on CUDA as well
    hal.release()
    with pytest.raises((ValueError, RuntimeError)):
        torch.futures.Future(devices=["cuda:0"])
    assert torch.futures.Future.__init__.__module__ == "torch.futures"


@pytest.mark.parametrize("where", ["torch._utils", "torch.cuda._utils", "torch.cuda"])
def test_libraries_are_told_the_index_of_a_device(cuda, where):
    t = cuda.torch
    index = functools.reduce(getattr, where.split(".")[1:], t)._get_device_index
    for device in (None, "cuda", "cuda:0", t.device("cuda"), 0):
        assert index(device, True) == 0
    for device in (None, t.device("cuda")):
        with pytest.raises(ValueError, match="specified index"):
            index(device)
    with pytest.raises(ValueError, match="Expected a cuda device"):
        index("cpu", True)
    assert index("cpu", True, True) == -1
    if where != "torch._utils":  # which takes an accelerator of any kind
        for also in ((), (True,)):
            with pytest.raises(ValueError, match=r"Expected a cuda .*device, but got: meta"):
                index("meta", True, *also)
    assert index(3) == index("cuda:3") == 3  # nobody asks whether there is one
    assert index(t.cuda.device(0)) == 0
    assert t._utils._get_all_device_indices() == [0]
    assert t._utils._get_current_device_index() == 0


@pytest.mark.filterwarnings("ignore:.*autocast.*:FutureWarning")
def test_autocast_has_cudas_default_dtype(cuda):
    layer, x = torch.nn.Linear(2, 2, device="cuda"), cuda.torch.ones(1, 2, device="cuda")
    with cuda.torch.autocast("cuda"):
        assert layer(x).dtype == torch.float16
        assert cuda.torch.is_autocast_enabled()
        assert cuda.torch.get_autocast_gpu_dtype() == torch.float16
    with cuda.torch.cuda.amp.autocast(dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*GradScaler.*:FutureWarning")
def test_a_scaler_scales(cuda):
    for scaler in (cuda.torch.cuda.amp.GradScaler(), cuda.torch.amp.GradScaler(), cuda.torch.amp.GradScaler("cuda")):
        assert scaler.is_enabled()
        assert scaler.scale(cuda.torch.ones(1, device="cuda")).item() == 65536


def test_streams_and_events_work(cuda):
    first, last = (cuda.torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = cuda.torch.cuda.Stream()
    with cuda.torch.cuda.stream(stream):
        assert cuda.torch.cuda.current_stream() == stream
        first.record()
        cuda.torch.zeros(4, device="cuda").record_stream(stream)
        last.record(stream)
    assert cuda.torch.cuda.current_stream() == cuda.torch.cuda.default_stream() != stream
    stream.wait_stream(cuda.torch.cuda.current_stream())
    stream.wait_event(last)
    cuda.torch.cuda.synchronize()
    assert first.query()
    assert first.elapsed_time(last) >= 0
    with pytest.raises(ValueError, match="enable_timing"):
        cuda.torch.cuda.Event().elapsed_time(last)
    with pytest.raises(ValueError, match="recorded"):
        first.elapsed_time(cuda.torch.cuda.Event(enable_timing=True))


def test_random_states_come_back(cuda):
    cuda.torch.cuda.manual_seed_all(5)
    state = cuda.torch.cuda.get_rng_state()
    first = cuda.torch.rand(3, device="cuda")
    cuda.torch.cuda.set_rng_state(state)
    assert torch.equal(first, cuda.torch.rand(3, device="cuda"))
    assert cuda.torch.cuda.initial_seed() == 5
    with cuda.torch.random.fork_rng(devices=[0]):
        cuda.torch.rand(9, device="cuda")
    generator = cuda.torch.cuda.default_generators[0]
    assert isinstance(generator, torch.Generator)
    assert len(cuda.torch.cuda.default_generators) == 1


def test_a_generator_for_cuda_draws_on_the_device(cuda):
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        generator = cuda.torch.Generator(device=device)
        generator.manual_seed(3)
        first = cuda.torch.randn(4, generator=generator, device="cuda")
        assert first.is_cuda
        assert torch.equal(first, torch.randn(4, generator=torch.Generator().manual_seed(3)))
        assert isinstance(generator, cuda.torch.Generator)
        assert isinstance(generator, torch.Generator)
    assert not isinstance(3, cuda.torch.Generator)
    assert cuda.torch.Generator().device.type == "cpu"


def test_memory_is_told(cuda):
    assert cuda.torch.cuda.memory_allocated() > 0
    assert cuda.torch.cuda.max_memory_allocated() >= cuda.torch.cuda.memory_allocated() // 2
    free, total = cuda.torch.cuda.mem_get_info()
    assert 0 < free <= total == cuda.torch.cuda.get_device_properties(0).total_memory
    assert cuda.torch.cuda.memory_stats()["reserved_bytes.all.peak"] > 0
    assert cuda.torch.cuda.memory_stats_as_nested_dict()["num_ooms"] == 0
    assert "cpu" in cuda.torch.cuda.memory_summary()


def test_what_a_cpu_cannot_do_is_refused_with_the_line(cuda):
    with pytest.raises(UnsupportedOperation, match=r"torch.cuda.CUDAGraph at .*test_adoption.py:\d+"):
        cuda.torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="no CUDA runtime"):
        cuda.torch.cuda.cudart().cudaMalloc()
    refused = entries(cuda, "refused")
    assert refused["torch.cuda.CUDAGraph"].file == __file__


def test_a_call_without_effect_says_so_once(cuda, caplog):
    for _ in range(3):
        cuda.torch.cuda.memory._record_memory_history(max_entries=5)
    assert len([record for record in caplog.records if "does nothing on cpu" in record.message]) == 1
    assert entries(cuda, "idle")["torch.cuda.memory._record_memory_history"].calls == 3


def test_calls_are_counted_under_their_lines(cuda):
    for _ in range(4):
        cuda.torch.cuda.synchronize()
    found = entries(cuda, "redirected")["torch.cuda.synchronize"]
    assert (found.file, found.calls) == (__file__, 4)
    line = Path(__file__).read_text().splitlines()[found.line - 1]
    assert "cuda.torch.cuda.synchronize()" in line


def test_a_path_is_never_touched(cuda, tmp_path):
    file = tmp_path / "cuda_run" / "cuda.pt"
    file.parent.mkdir()
    cuda.torch.save({"cuda": cuda.torch.ones(2, device="cuda"), "where": "cuda:0"}, str(file))
    for where in (None, "cuda", "cuda:0", torch.device("cuda", 0), {"cpu": "cuda:0"}):
        loaded = cuda.torch.load(str(file), map_location=where)
        assert list(loaded) == ["cuda", "where"]
        assert loaded["where"] == "cuda:0"
        assert loaded["cuda"].tolist() == [1, 1]
        assert loaded["cuda"].is_cuda, where
    for where in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, _: storage):
        assert not cuda.torch.load(str(file), map_location=where)["cuda"].is_cuda, where


def test_the_compiler_sees_what_eager_code_sees(cuda):
    def branch(x):
        if x.device.type == "cuda" and x.is_cuda:
            return x + 1
        return x - 1

    x = cuda.torch.zeros(3, device="cuda")
    compiled = torch.compile(branch, backend="eager", fullgraph=True)
    assert compiled(x).tolist() == branch(x).tolist() == [1, 1, 1]


@pytest.mark.parametrize("move", [
    lambda x: x.cuda(), lambda x: (x + 1).cuda() - 1, lambda x: x.cuda(0), lambda x: x.cuda("cuda:0", True),
    lambda x: x.cuda(device="cuda"), lambda x: x.cuda(non_blocking=True),
    lambda x: x.cuda(memory_format=torch.contiguous_format), lambda x: torch.zeros(3).cuda() + x,
])  # fmt: skip
def test_a_graph_that_moves_something_to_cuda_is_made_for_the_true_device(cuda, move):
    """With a backend that makes kernels: torch's own classes that stand for tensors there ask the true torch.cuda."""
    x = torch.arange(3.0, device="cuda")
    found = torch.compile(move, backend="aot_eager", fullgraph=True)(x)
    assert found.tolist() == [0, 1, 2]
    assert found.is_cuda


def test_a_graph_that_moves_something_to_another_device_by_cuda_is_an_error(cuda):
    with pytest.raises(Exception, match="must be cuda device"):
        torch.compile(lambda x: x.cuda("cpu"), backend="aot_eager", fullgraph=True)(torch.ones(2))


def test_a_tensor_on_the_device_is_not_on_the_cpu(cuda):
    device, host = torch.ones(2, device="cuda"), torch.ones(2).cpu()
    assert (device.is_cpu, device.cpu().is_cpu, host.is_cpu) == (False, True, True)
    compiled = torch.compile(lambda x: x - 1 if x.is_cpu else x + 1, backend="eager", fullgraph=True)
    assert compiled(device).tolist() == [2, 2]
    entries = [entry for entry in cuda.adoption.entries() if entry.api == "torch.Tensor.is_cpu"]
    assert [entry.kind for entry in entries] == ["belief", "belief"]  # run, and compiled


def test_an_operator_that_a_cpu_lacks_runs_another_way_and_is_counted(cuda):
    experts = cuda.torch.tensor([0, 2, 2, 3, 2], dtype=torch.int32, device="cuda")
    for counts in (cuda.torch.histc(experts, bins=4, min=0, max=3), experts.histc(bins=4, min=0, max=3)):
        assert counts.tolist() == [1, 0, 3, 1]
        assert counts.dtype == torch.int32
    found = [entry for entry in cuda.adoption.entries() if entry.kind == "fallback"]
    assert sum(entry.calls for entry in found) == 2
    assert sum(entry.nbytes for entry in found) == 2 * 5 * 4


def test_what_is_made_read_and_asked_of_a_class_is_counted_where_it_is_written(cuda):
    source = """
import torch
g = torch.Generator("cuda")
f = torch.cuda.FloatTensor(3)
s = torch.cuda.Stream()
e = torch.cuda.Event(enable_timing=True)
s.wait_stream(torch.cuda.current_stream())
b = isinstance(f, torch.cuda.FloatTensor)
with torch.cuda.device(0), torch.cuda.stream(s):
    v = torch.version.cuda
t = torch.Stream("cuda"), torch.Stream("cpu")
h = torch.Generator()
"""
    exec(compile(source, "made.py", "exec"), {"__name__": "made"})
    found = {(e.line, e.kind, e.api) for e in cuda.adoption.entries() if e.file and e.file.endswith("made.py")}
    assert found == {
        (3, "redirected", "torch.Generator"), (4, "redirected", "torch.cuda.FloatTensor"),
        (5, "redirected", "torch.cuda.Stream"), (6, "redirected", "torch.cuda.Event"),
        (7, "redirected", "torch.cuda.current_stream"), (8, "belief", "torch.cuda.FloatTensor"),
        (9, "redirected", "torch.cuda.device"), (9, "redirected", "torch.cuda.stream"),
        (10, "belief", "torch.version.cuda"), (11, "redirected", "torch.Stream"),
    }  # fmt: skip


# The end of it -------------------------------------------------------------------------------------------------------


def snapshot():
    """What every module of torch's and every class of interest holds, by identity."""
    modules = {name: dict(vars(module)) for name, module in list(sys.modules.items())
               if isinstance(module, types.ModuleType) and name.partition(".")[0] == "torch"}  # fmt: skip
    classes = {kind: dict(vars(kind)) for kind in (torch.Tensor, torch.nn.Module, torch.autocast, torch.amp.GradScaler,
                                                   torch.nn.parallel.DistributedDataParallel)}  # fmt: skip
    return {**modules, **classes}


def test_every_name_in_torch_is_the_original_object_again():
    torch.zeros(1).to("cpu")  # what torch itself fills on first use is there before
    import builtins

    before, importers = snapshot(), (builtins.__import__, importlib.import_module)
    with hal.adopt("cpu"):
        assert torch is not before["torch"].get("torch")
        assert importlib.import_module("torch").zeros(1, device="cuda").is_cuda
    after = snapshot()
    changed = [
        (owner, name) for owner, names in before.items() for name, value in names.items()
        if after[owner].get(name, None) is not value
        and name != "COMPILE_COUNTER"  # torch's own, renewed whenever compiled code is forgotten
    ]  # fmt: skip
    assert changed == []
    assert set(after[torch.Tensor]) == set(before[torch.Tensor])
    assert (builtins.__import__, importlib.import_module) == importers
    assert adopted() is None


captured_zeros, captured_cuda = torch.zeros, torch.cuda
captured_to, captured_module_cuda = torch.Tensor.to, torch.nn.Module.cuda


def test_names_captured_before_are_redirected_and_put_back():
    zeros, cuda, to, module_cuda = captured_zeros, captured_cuda, captured_to, captured_module_cuda
    with hal.adopt("cpu"):
        assert captured_zeros is not zeros
        assert captured_zeros(1, device="cuda").is_cuda
        assert captured_cuda.is_available()
        assert captured_to(torch.ones(1), "cuda").is_cuda
        assert captured_module_cuda(torch.nn.Linear(1, 1)).weight.is_cuda
        globals()["captured_inside"] = captured_zeros
    assert captured_zeros is zeros
    assert captured_cuda is cuda
    assert captured_to is to is torch.Tensor.to
    assert captured_module_cuda is module_cuda is torch.nn.Module.cuda
    assert globals().pop("captured_inside") is zeros


def test_a_wrapper_that_is_kept_calls_the_original():
    with hal.adopt("cpu"):
        t = importlib.import_module("torch")
        kept = [t.zeros, t.cuda.is_available, t.load, torch.Tensor.to]
    assert torch.equal(kept[0](2), torch.zeros(2))
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        kept[0](2, device="cuda")
    assert kept[1]() is False
    assert kept[3](torch.zeros(1), torch.float64).dtype == torch.float64


def test_what_somebody_else_replaced_meanwhile_stays(monkeypatch, caplog):
    theirs = lambda self: "theirs"  # noqa: E731
    original = torch.Tensor.get_device
    try:
        with hal.adopt("cpu"):
            torch.Tensor.get_device = theirs
        assert torch.Tensor.get_device is theirs
        assert "leaves Tensor.get_device" in caplog.text
    finally:
        del torch.Tensor.get_device
    assert torch.Tensor.get_device is original


def test_one_device_at_a_time():
    with hal.adopt("cpu"), pytest.raises(ConfigError, match="cpu is adopted already"):
        hal.adopt("cpu")
    hal.release()
    hal.release()


def test_an_adoption_that_fails_leaves_nothing_behind(monkeypatch):
    before = snapshot()
    with pytest.raises(UnknownDevice):
        hal.adopt("no-such-device")
    from hal.launch.surface.tensors import methods as tensors

    monkeypatch.setattr(tensors, "_install_modules", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hal.adopt("cpu")
    assert adopted() is None
    assert torch.Tensor.to is before[torch.Tensor].get("to", torch._C.TensorBase.to)


def test_what_a_program_sets_on_torch_reaches_torch(cuda):
    cuda.torch.backends.cudnn.benchmark = True
    cuda.torch.a_new_name = 3
    try:
        assert torch.backends.cudnn.benchmark is True
        assert vars(sys.modules["torch"])["a_new_name"] == 3
    finally:
        cuda.torch.backends.cudnn.benchmark = False
        del cuda.torch.a_new_name
    assert "a_new_name" not in vars(sys.modules["torch"])


def test_modules_and_functions_that_are_seen_can_be_pickled(cuda):
    assert pickle.loads(pickle.dumps(cuda.torch)) is cuda.torch
    x = pickle.loads(pickle.dumps(cuda.torch.ones(2, device="cuda")))
    assert x.tolist() == [1, 1]
    assert pickle.loads(pickle.dumps(cuda.torch.zeros)) is cuda.torch.zeros


def test_import_hal_imports_no_torch():
    code = "import hal, sys; hal.release(); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_of_kernels_is_an_import_error_that_says_what_to_do():
    with (
        hal.adopt("cpu"),
        pytest.raises(ModuleNotFoundError, match=r"No module named 'xformers'; on cpu.*scaled_dot_product_attention"),
    ):
        import xformers
    with pytest.raises(ModuleNotFoundError) as caught:
        import xformers  # noqa: F401
    assert "scaled_dot_product_attention" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_code_finds_what_stands_in_for_torchs_functions(cuda):
    torch = cuda.torch

    class Model(torch.nn.Module):
        def forward(self, x):
            return helper(x) + torch.ones(2, device="cuda")

    def helper(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) + torch.arange(2, device="cuda")

    assert torch.jit.script(helper)(torch.ones(2)).tolist() == [0, 1]
    assert torch.jit.script(Model())(torch.ones(2)).tolist() == [1, 2]
    assert not [entry for entry in cuda.adoption.entries() if entry.kind == "change"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_scripted_code_asks_of_devices_is_a_change_of_meaning(cuda):
    torch = cuda.torch

    def branches(x: torch.Tensor) -> bool:
        return x.is_cuda

    torch.jit.script(branches)
    (change,) = [entry for entry in cuda.adoption.entries() if entry.kind == "change"]
    assert change.file == __file__
    assert change.api == "torch.jit.script"
    assert "is_cuda" in change.note


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_the_table_of_scripts_is_torchs_own_after_a_release():
    from torch.jit import _builtins

    before = dict(_builtins._get_builtin_table())
    with hal.adopt("cpu"):
        torch = importlib.import_module("torch")

        def ones(x: torch.Tensor) -> torch.Tensor:
            return torch.ones(2) + x

        torch.jit.script(ones)
    assert dict(_builtins._get_builtin_table()) == before


@pytest.mark.parametrize("default", ["cuda", "cpu"])
def test_compiled_code_moves_what_it_computes_whatever_the_default_device(cuda, default):
    with cuda.torch.device(default):
        x = cuda.torch.ones(2, 3, device="cuda")
        compiled = torch.compile(lambda x: x.sum(1).to(dtype=torch.int8), backend="eager", fullgraph=True)
        assert compiled(x).tolist() == [3, 3]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of itself
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda:0")])
def test_a_device_that_torchs_own_code_is_given_while_it_is_traced_is_the_true_one(cuda, device):
    from torch.nn.attention.flex_attention import create_block_mask

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    document = torch.tensor([0, 0, 1, 1], device="cuda").repeat_interleave(32)
    block_mask = torch.compile(create_block_mask, backend=backend, fullgraph=True)(
        lambda b, h, q, k: (q >= k) & (document[q] == document[k]), 1, 1, 128, 128, device=device, BLOCK_SIZE=32
    )
    assert block_mask.to_dense().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert "device(type='cpu'" in graphs[0]
    assert "cuda" not in graphs[0].replace("torch.cuda", "")


# All of these are torch's of itself: the last one when it goes on after what it does not compile.
@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore::DeprecationWarning", "ignore:The .grad attribute of"
)
@pytest.mark.parametrize("how", ["eager", "compiled", "inside"])
def test_flex_attention_is_trained_in_the_plain_form(cuda, how):
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    block_mask = flex.create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cuda")
    call = {
        "eager": flex.flex_attention,
        "compiled": torch.compile(flex.flex_attention),
        "inside": torch.compile(lambda *given, **named: flex.flex_attention(*given, **named) * 1, backend="eager"),
    }[how]
    q, k, v = (cuda.torch.randn(1, heads, 128, 16, device="cuda", requires_grad=True) for heads in (4, 2, 2))

    def gradients(result):
        for tensor in (q, k, v):
            tensor.grad = None
        result.square().sum().backward()
        return [result.detach(), *(tensor.grad for tensor in (q, k, v))]

    found = gradients(call(q, k, v, block_mask=block_mask, enable_gqa=True))
    plain = gradients(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert "with gradients in the plain form" in entries(cuda, "fallback")[f"{flex.__name__}.flex_attention"].note
    with cuda.torch.no_grad():
        torch.testing.assert_close(call(q, k, v, block_mask=block_mask, enable_gqa=True), found[0])


def test_a_module_of_torchs_that_is_loaded_later_is_redirected_and_put_back(tmp_path):
    code = """
        import sys
        import hal
        with hal.adopt("cpu"):
            import torch
            assert "torch.nn.attention.flex_attention" not in sys.modules
            import torch.nn.attention.flex_attention as late
            from torch.nn.attention.flex_attention import flex_attention, create_block_mask
            from torch.nn.attention import flex_attention as again
            assert late is again is torch.nn.attention.flex_attention
            assert late.flex_attention is flex_attention
        original = sys.modules["torch.nn.attention.flex_attention"]
        assert original.flex_attention is not late.__dict__.get("nothing")
        assert late is original and flex_attention is original.flex_attention, (late, flex_attention)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_libraries_that_ask_torchs_private_functions_get_the_same_answers(cuda):
    from torch._utils import _get_available_device_type, _get_device_module

    assert _get_available_device_type() == "cuda"
    assert _get_device_module("cuda") is torch.cuda
    assert _get_device_module("cpu") is torch.cpu


def test_the_compiler_can_be_reset_while_a_device_is_adopted(cuda):
    torch = cuda.torch
    compiled = torch.compile(lambda x: x.device.type == "cuda", backend="eager")
    assert compiled(torch.ones(2, device="cuda"))
    importlib.import_module("torch._dynamo").reset()
    assert compiled(torch.ones(2, device="cuda"))


class Wrapper(torch.Tensor):
    """A tensor around another one, as libraries of quantised ones write it."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        given = torch.utils._pytree.tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        found = function(*given[0], **given[1])
        return Wrapper(found) if function is torch.ops.aten.detach.default else found


def test_a_tensor_that_wraps_another_trains(cuda):
    inner = cuda.torch.ones(3, 3, device="cuda")
    parameter = torch.nn.Parameter(Wrapper(inner))
    assert parameter.is_cuda
    assert parameter.device == inner.device
    (cuda.torch.ones(2, 3, device="cuda") @ parameter).sum().backward()
    assert parameter.grad.tolist() == [[2.0] * 3] * 3


class Moved(torch.nn.Parameter):
    """A parameter with a `to` of its own."""

    def to(self, *args, **kwargs):
        return super().to(*args, **kwargs)


@pytest.mark.parametrize("move", [lambda m: m.cuda(), lambda m: m.to("cuda"), lambda m: m.to(0)])
def test_a_module_moves_also_what_stands_between_with_a_to_of_its_own(cuda, move):
    model = torch.nn.Linear(2, 2)
    model.weight = Moved(torch.ones(2, 2))
    assert [p.device.type for p in move(model).parameters()] == ["cuda", "cuda"]
    assert [p.device.type for p in model.cpu().parameters()] == ["cpu", "cpu"]
    own = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: own(self, *args, **kwargs)  # as a profiler does
    try:
        assert [p.device.type for p in move(torch.nn.Linear(2, 2)).parameters()] == ["cuda", "cuda"]
    finally:
        torch.Tensor.to = own


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("asked", [None, "cpu", "cuda"])
def test_a_saved_script_is_loaded_by_torch_load_too(cuda, asked, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "s.pt")
    with (tmp_path / "s.pt").open("rb") as file:
        for given in (tmp_path / "s.pt", file):
            assert cuda.torch.load(given, map_location=asked, weights_only=False)(torch.ones(2)).shape == (2,)


class Kept(torch.nn.Module):
    """Moves, and keeps a copy on the host."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.kept = self.w.detach().to(torch.device("cpu"))
        return self


def test_a_module_that_moves_may_keep_something_on_the_host(cuda):
    model = Kept().to("cuda")
    model.w.data.add_(1)
    assert (model.kept.tolist(), model.kept.device.type) == ([0, 0], "cpu")
    table = torch.nn.Linear(2, 2)
    model.table = table
    model.to("cuda")
    table._apply(lambda x: x.to(cuda.torch.device("cpu")))
    assert table.weight.device.type == "cpu"


class Sides(torch.nn.Module):
    def forward(self, x):
        host = x.to("cpu")
        x.add_(1)
        return host, x.is_cuda, x.device.type, x.get_device()


def test_a_graph_that_the_program_traced_itself_sees_what_the_program_sees(cuda):
    traced = torch.fx.symbolic_trace(Sides())
    found = [module(cuda.torch.zeros(2, device="cuda")) for module in (traced, Sides())]
    for host, *sides in found:
        assert (host.tolist(), host.device.type, sides) == ([0, 0], "cpu", [True, "cuda", 0])


@pytest.mark.parametrize("asked", [None, "cpu", "cuda", "cuda:0", torch.device("cuda"), {"cuda:0": "cpu"}])
def test_tensors_that_wrap_others_are_loaded(cuda, asked, tmp_path):
    file = tmp_path / "x.pt"
    for tensor in (Wrapper(cuda.torch.ones(2, device="cuda")), Wrapper(torch.ones(2))):
        torch.save(tensor, file)
        found = cuda.torch.load(file, map_location=asked, weights_only=False)
        assert isinstance(found, Wrapper)
        assert found.inner.tolist() == [1, 1]


def test_what_is_on_the_host_is_not_for_a_simulated_device():
    with hal.adopt("sim:h200", strict=True):
        program = importlib.import_module("torch")
        program.linalg.eigh(program.eye(3))
        with pytest.raises(UnsupportedOperation, match="_linalg_eigh"):
            program.linalg.eigh(program.eye(3, device="cuda"))


def test_adopting_leaves_the_garbage_collector_nothing_to_look_at_and_frozen_objects_frozen():
    code = (
        "import gc, hal\n"
        "hal.adopt('cpu')\n"  # imports torch, which makes half a million objects
        "assert gc.isenabled() and gc.get_freeze_count() == 0\n"
        "assert len(gc.get_objects(generation=0)) < 10_000\n"
        "hal.release()\n"
        "gc.freeze()\n"
        "hal.adopt('cpu')\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_reaches_the_device_without_naming_it_is_counted(cuda):
    code = compile(
        "torch.set_default_device('cuda')\ny = torch.ones(2)\ntorch.set_default_device(None)\n"
        "with torch.device('cuda'):\n    z = torch.ones(2)\nx = torch.ones(2).to(y)\nx = torch.ones(2).type_as(y)\n",
        "implicit.py", "exec",
    )  # fmt: skip
    exec(code, {"torch": cuda.torch, "__name__": "implicit"})
    found = {(e.api, e.line) for e in cuda.adoption.entries() if e.file and e.file.endswith("implicit.py")}
    assert found == {("torch.set_default_device", 1), ("torch.device", 4), ("torch.Tensor.to", 6),
                     ("torch.Tensor.type_as", 7)}  # fmt: skip


def test_what_was_compiled_before_takes_the_branch_of_an_adoption():
    before = torch.compile(lambda x: x * 2 if x.device.type == "cuda" else x * 3, backend="eager")
    assert before(torch.ones(1)).item() == 3
    for _ in range(2):
        with hal.adopt("cpu"):
            assert before(importlib.import_module("torch").ones(1, device="cuda")).item() == 2
        assert before(torch.ones(1)).item() == 3


def test_a_torch_whose_fake_tensors_ask_otherwise_is_adopted(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensor

    monkeypatch.delattr(FakeTensor, "_normalize_fake_device")
    with hal.adopt("cpu"):
        pass
