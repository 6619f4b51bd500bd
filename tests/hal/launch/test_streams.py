# SPDX-License-Identifier: Apache-2.0
"""Streams, events and NVIDIA's profiler on a CPU: they order, record and mark nothing, and look as on CUDA."""

import importlib

import pytest
import torch

import hal


@pytest.fixture
def program():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu"):
        yield importlib.import_module("torch")


def test_a_stream_gives_the_one_before_back(program):
    first, second = program.cuda.Stream(), program.cuda.Stream()
    with program.cuda.stream(first):
        with second:
            assert program.cuda.current_stream() == second
            with second, first:
                assert program.cuda.current_stream() == first
            assert program.cuda.current_stream() == second
        assert program.cuda.current_stream() == first
    assert program.cuda.current_stream() == program.cuda.default_stream()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0), 0, None])
def test_torchs_streams_and_events_of_any_device_are_cudas(device, program):
    stream, event = program.Stream(device=device), program.Event(device=device, enable_timing=True)
    assert stream.device.type == "cuda"
    for thing, kind in ((stream, "Stream"), (event, "Event")):
        assert isinstance(thing, getattr(program, kind))
        assert isinstance(thing, getattr(program.cuda, kind))
    event.record(stream)
    later = program.Event(enable_timing=True)
    later.record()
    assert event.elapsed_time(later) >= 0
    assert isinstance(program.cuda.current_stream(), program.Stream)
    assert not isinstance(3, program.Stream)
    assert program.Stream(device="cpu").device.type == "cpu"


def test_ranges_of_nvtx_are_blocks_and_decorators(program):
    @program.cuda.nvtx.range("name")
    def doubled(x):
        return 2 * x

    assert doubled(2) == 4
    with program.cuda.nvtx.range("name"), program.autograd.profiler.emit_nvtx(), program.cuda.profiler.profile():
        assert doubled(3) == 6
    with program.autograd.profiler.emit_nvtx(record_shapes=True) as emitting:
        assert emitting is not None


def test_memory_and_properties_have_what_programs_read(program):
    snapshot = program.cuda.memory._snapshot()
    assert snapshot["segments"] == program.cuda.memory_snapshot() == []
    assert len(snapshot["device_traces"]) == 1
    assert program.backends.cudnn.version() >= 90000
    properties = program.cuda.get_device_properties(0)
    for name in ("max_threads_per_block", "clock_rate", "memory_clock_rate", "memory_bus_width", "pci_bus_id",
                 "pci_device_id", "pci_domain_id", "L2_cache_size", "warp_size"):  # fmt: skip
        assert isinstance(getattr(properties, name), int)


def test_the_cache_of_ffts_plans_keeps_its_size(program):
    cache = program.backends.cuda.cufft_plan_cache
    assert (cache.size, cache.max_size, cache[0].max_size, cache["cuda:0"].max_size) == (0, 4096, 4096, 4096)
    cache.clear()
    cache[0].max_size = 3
    assert program.backends.cuda.cufft_plan_cache.max_size == 3
    cache.max_size = 0
    assert cache[program.device("cuda")].max_size == 0
    program.fft.fft(program.ones(4, device="cuda"))
    for wrong in (lambda: setattr(cache, "size", 1), lambda: setattr(cache, "max_size", -1), lambda: cache[1]):
        with pytest.raises(RuntimeError):
            wrong()
    with pytest.raises(AttributeError):
        cache.no_such_name  # noqa: B018


def test_running_out_of_memory_is_caught_by_cudas_name(program):
    def ran_out(kind):
        try:
            program.empty(10**15, device="cuda")
        except kind():
            return True

    assert ran_out(lambda: program.cuda.OutOfMemoryError)
    assert ran_out(lambda: program.OutOfMemoryError)
    with pytest.raises(RuntimeError, match="shape"):
        try:
            program.ones(2, device="cuda") @ program.ones(3, device="cuda")
        except program.cuda.OutOfMemoryError:
            pytest.fail("any error was taken for one of memory")
        except RuntimeError as error:
            raise RuntimeError("shape") from error
    assert program.cuda.OutOfMemoryError is torch.OutOfMemoryError
    with pytest.raises(program.cuda.OutOfMemoryError):
        raise torch.OutOfMemoryError("asked")


@pytest.mark.parametrize(
    ("name", "library"), [("preferred_linalg_library", "magma"), ("preferred_blas_library", "cublaslt")]
)
def test_a_library_that_a_program_prefers_is_kept(program, name, library):
    preferred = getattr(program.backends.cuda, name)
    default = preferred()
    assert preferred(library) is preferred() is not default
    assert preferred(default) is default
    for wrong in ("mkl", 3):
        with pytest.raises(RuntimeError, match="Unknown input value"):
            preferred(wrong)


@pytest.mark.filterwarnings("ignore:.*set_default_tensor_type.*:UserWarning")
def test_a_default_type_of_the_host_undoes_one_of_cudas(program):
    try:
        program.set_default_tensor_type(program.cuda.FloatTensor)
        assert program.ones(1).is_cuda
        program.set_default_tensor_type(program.FloatTensor)
        assert not program.ones(1).is_cuda
    finally:
        program.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_a_program_that_imports_without_saying_who_it_is_gets_its_own(program):
    import pydoc
    import types

    assert __import__("torch").cuda.is_available()
    assert eval("__import__('torch').cuda.is_available()", {})
    assert pydoc.locate("torch.cuda.is_available")()
    user = types.ModuleType("hal_something")
    exec("import torch\nseen = torch.cuda.is_available(), torch.ones(2, device='cuda').is_cuda", vars(user))
    assert user.seen == (True, True)
    ours = types.ModuleType("hal_cpu.anything")
    exec("import torch\nx = torch.ones(2)\nseen = x.device.type", vars(ours))
    assert ours.seen == "cpu"
