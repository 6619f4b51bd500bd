# SPDX-License-Identifier: Apache-2.0
"""One exercise for each API that training code uses of CUDA, named as in the count over 36 repositories.

Run as a program, under `hal run` or on a machine with CUDA, it does all of them and prints as JSON what came out: "" for
an exercise that did what it does on CUDA, or the error.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

EXERCISES = {
    # Where am I, and what is here
    "torch.cuda.current_device": "assert torch.cuda.current_device() == 0",
    "torch.cuda.is_available": "assert torch.cuda.is_available() is True",
    "torch.cuda.device_count": "assert torch.cuda.device_count() >= 1",
    "torch.cuda.is_initialized": "torch.cuda.init(); assert torch.cuda.is_initialized()",
    "torch.cuda.init": "torch.cuda.init()",
    "torch.cuda._lazy_init": "torch.cuda._lazy_init()",
    "torch.cuda._lazy_call": "done = []; torch.cuda._lazy_call(lambda: done.append(1)); assert done",
    "torch.cuda._is_in_bad_fork": "assert torch.cuda._is_in_bad_fork() is False",
    "torch.cuda (module object)": "m = torch.cuda; assert m.is_available() and hasattr(torch, 'cuda')",
    "torch.cuda.get_device_capability": "assert torch.cuda.get_device_capability() >= (7, 0)",
    "torch.cuda.get_device_properties": "p = torch.cuda.get_device_properties(0); assert p.name and p.total_memory > 0",
    "torch.cuda.get_device_name": "assert torch.cuda.get_device_name(0)",
    "torch.cuda.is_bf16_supported": "assert torch.cuda.is_bf16_supported()",
    "torch.version.cuda": "assert isinstance(torch.version.cuda, str)",
    "torch.version.cuda.split": "assert int(torch.version.cuda.split('.')[0]) >= 11",
    "torch.version.hip": "assert torch.version.hip is None",
    "torch.version.hip.split": "assert torch.version.hip is None or torch.version.hip.split('.')",
    "device_properties.total_memory": "assert torch.cuda.get_device_properties('cuda').total_memory > 0",
    "device_properties.major": "assert torch.cuda.get_device_properties(0).major >= 7",
    "device_properties.minor": "assert torch.cuda.get_device_properties(0).minor >= 0",
    "device_properties.multi_processor_count": "assert torch.cuda.get_device_properties(0).multi_processor_count > 0",
    "device_properties.uuid": "assert str(torch.cuda.get_device_properties(0).uuid)",
    "device_properties.shared_memory_per_block_optin":
        "assert torch.cuda.get_device_properties(0).shared_memory_per_block_optin > 0",
    # Moving, and asking where something is
    "device='cuda' kwarg (factory fns etc.)":
        "assert torch.zeros(2, device='cuda').is_cuda and torch.nn.Linear(2, 2, device='cuda').weight.is_cuda",
    ".cuda()  [Tensor/Module method]":
        "assert torch.ones(2).cuda().is_cuda and next(torch.nn.Linear(2, 2).cuda().parameters()).is_cuda",
    ".to('cuda'|f'cuda:N')": "assert torch.ones(2).to('cuda').is_cuda and torch.ones(2).to(f'cuda:{0}').is_cuda",
    "torch.device('cuda'|f'cuda:N')":
        "d = torch.device('cuda', 0); assert d.type == 'cuda' and torch.ones(2, device=d).device == d == torch.device(0)",
    "device comparison  (x.type == 'cuda', 'cuda' in x)":
        "x = torch.ones(2).cuda(); assert x.device.type == 'cuda' and 'cuda' in str(x.device) and x.get_device() == 0",
    "other 'cuda' string literal (default arg, variable, argparse)":
        "name = 'cuda'; assert torch.ones(2).to(name).device.type == name",
    "Tensor.is_cuda": "assert torch.ones(2).cuda().is_cuda and not torch.ones(2).is_cuda",
    "torch.cuda.device": "with torch.cuda.device(0): assert torch.cuda.current_device() == 0",
    "torch.cuda.set_device": "torch.cuda.set_device(0); torch.cuda.set_device('cuda:0')",
    "torch.set_default_device":
        "torch.set_default_device('cuda'); made = torch.ones(2); torch.set_default_device(None); assert made.is_cuda",
    "torch.set_default_device('cuda')":
        "torch.set_default_device('cuda'); made = torch.ones(2); torch.set_default_device(None); assert made.is_cuda",
    "torch.Generator('cuda')": "g = torch.Generator('cuda').manual_seed(3); torch.randn(2, device='cuda', generator=g)",
    "torch.load(map_location='cuda')":
        "torch.save(torch.ones(2), tmp / 'x'); assert torch.load(tmp / 'x', map_location='cuda').is_cuda",
    "pin_memory=True kwarg":
        "l = torch.utils.data.DataLoader([torch.ones(2)], pin_memory=True); assert next(iter(l)).cuda().is_cuda",
    ".pin_memory() method": "assert torch.ones(2).pin_memory().cuda(non_blocking=True).sum() == 2",
    "torch.nn.DataParallel":
        "m = torch.nn.DataParallel(torch.nn.Linear(2, 2).cuda()); assert m(torch.ones(1, 2).cuda()).is_cuda",
    # Typed tensors
    "torch.cuda.LongTensor": "assert torch.cuda.LongTensor([1, 2]).dtype is torch.int64",
    "torch.cuda.FloatTensor": "assert torch.cuda.FloatTensor(2, 3).is_cuda",
    "torch.cuda.IntTensor": "assert torch.cuda.IntTensor([1]).dtype is torch.int32",
    "torch.cuda.HalfTensor": "assert torch.cuda.HalfTensor(2).dtype is torch.float16",
    "torch.cuda.BFloat16Tensor": "assert torch.cuda.BFloat16Tensor(2).dtype is torch.bfloat16",
    "torch.cuda.DoubleTensor": "assert torch.cuda.DoubleTensor(2).dtype is torch.float64",
    "torch.cuda.ByteTensor": "assert torch.cuda.ByteTensor([1]).dtype is torch.uint8",
    "isinstance(x, torch.cuda.*Tensor/Event/Stream)":
        "assert isinstance(torch.ones(2).cuda(), torch.cuda.FloatTensor) "
        "and isinstance(torch.cuda.Event(), torch.cuda.Event)",
    # Streams, events, graphs
    "torch.cuda.synchronize": "torch.cuda.synchronize(); torch.cuda.synchronize(0)",
    "torch.cuda.Event": "e = torch.cuda.Event(enable_timing=True); e.record(); e.synchronize(); assert e.query()",
    "Event.elapsed_time":
        "a, b = (torch.cuda.Event(enable_timing=True) for _ in 'ab'); a.record(); b.record(); "
        "torch.cuda.synchronize(); assert a.elapsed_time(b) >= 0",
    "torch.cuda.Stream": "s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream()); s.synchronize()",
    "torch.cuda.stream":
        "s = torch.cuda.Stream()\nwith torch.cuda.stream(s): assert torch.cuda.current_stream() == s",
    "torch.cuda.current_stream": "torch.cuda.current_stream().synchronize()",
    "torch.cuda.default_stream": "assert torch.cuda.default_stream() == torch.cuda.current_stream()",
    "torch.cuda.set_stream":
        "s = torch.cuda.Stream(); torch.cuda.set_stream(s); now = torch.cuda.current_stream(); "
        "torch.cuda.set_stream(torch.cuda.default_stream()); assert now == s",
    "torch.cuda.ExternalStream":
        "torch.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream).synchronize()",
    "Tensor.record_stream": "torch.ones(2).cuda().record_stream(torch.cuda.current_stream())",
    "torch.cuda.is_current_stream_capturing": "assert torch.cuda.is_current_stream_capturing() is False",
    "torch.cuda.CUDAGraph": "torch.cuda.CUDAGraph()",
    "torch.cuda.graph": "torch.cuda.graph(torch.cuda.CUDAGraph())",
    "torch.cuda.graph_pool_handle": "torch.cuda.graph_pool_handle()",
    # Memory
    "torch.cuda.empty_cache": "torch.cuda.empty_cache()",
    "torch.cuda.max_memory_allocated": "x = torch.ones(64).cuda(); assert torch.cuda.max_memory_allocated() > 0",
    "torch.cuda.memory_allocated": "x = torch.ones(64).cuda(); assert torch.cuda.memory_allocated() > 0",
    "torch.cuda.memory_reserved": "x = torch.ones(64).cuda(); assert torch.cuda.memory_reserved() > 0",
    "torch.cuda.max_memory_reserved": "x = torch.ones(64).cuda(); assert torch.cuda.max_memory_reserved() > 0",
    "torch.cuda.memory_cached": "assert torch.cuda.memory_cached() > 0",
    "torch.cuda.max_memory_cached": "assert torch.cuda.max_memory_cached() > 0",
    "torch.cuda.reset_peak_memory_stats": "torch.cuda.reset_peak_memory_stats()",
    "torch.cuda.reset_max_memory_allocated": "torch.cuda.reset_max_memory_allocated()",
    "torch.cuda.reset_max_memory_cached": "torch.cuda.reset_max_memory_cached()",
    "torch.cuda.memory_stats": "assert 'allocated_bytes.all.peak' in torch.cuda.memory_stats()",
    "torch.cuda.mem_get_info": "free, total = torch.cuda.mem_get_info(); assert 0 < free <= total",
    "torch.cuda.device_memory_used": "assert torch.cuda.device_memory_used() >= 0",
    "torch.cuda.memory_snapshot": "torch.cuda.memory_snapshot()",
    "torch.cuda.memory._snapshot": "torch.cuda.memory._snapshot()",
    "torch.cuda.memory._record_memory_history":
        "torch.cuda.memory._record_memory_history(max_entries=10); torch.cuda.memory._record_memory_history(enabled=None)",
    "torch.cuda.memory._dump_snapshot": "torch.cuda.memory._dump_snapshot(str(tmp / 'snapshot.pickle'))",
    "torch.cuda.memory.CUDAPluggableAllocator": "torch.cuda.memory.CUDAPluggableAllocator('a.so', 'malloc', 'free')",
    "torch.cuda.memory.memory_cached": "assert torch.cuda.memory.memory_cached() >= 0",
    "torch.cuda.memory.memory_stats_as_nested_dict":
        "assert torch.cuda.memory.memory_stats_as_nested_dict()['active']['all']['peak'] >= 0",
    "torch.cuda.memory.get_allocator_backend": "assert torch.cuda.memory.get_allocator_backend() == 'native'",
    "torch.cuda.get_per_process_memory_fraction": "assert torch.cuda.get_per_process_memory_fraction() == 1.0",
    "torch.cuda.host_memory_stats":
        "s = torch.cuda.host_memory_stats(); assert s['allocated_bytes.peak'] >= 0 and s['host_alloc_time.avg'] >= 0",
    "torch.cuda.host_memory_stats_as_nested_dict":
        "assert torch.cuda.host_memory_stats_as_nested_dict()['active_bytes']['current'] >= 0",
    "torch.cuda.reset_peak_host_memory_stats": "torch.cuda.reset_peak_host_memory_stats()",
    "torch.cuda.caching_allocator_enable": "torch.cuda.caching_allocator_enable(True)",
    "torch.cuda.caching_allocator_disabled":
        "with torch.cuda.memory.caching_allocator_disabled(): torch.ones(2, device='cuda')",
    "torch.cuda.FloatStorage": "assert issubclass(torch.cuda.FloatStorage, torch.TypedStorage)",
    # Copies among the devices of one process
    "torch.cuda.comm.broadcast":
        "from torch.cuda import comm; a = torch.ones(2); [b] = comm.broadcast(a, devices=[0]); "
        "assert b.is_cuda and b is not a and b.tolist() == [1, 1]; "
        "[c] = comm.broadcast(a, out=[torch.zeros(2).cuda()]); assert c.tolist() == [1, 1]",
    "torch.cuda.comm.broadcast_coalesced":
        "from torch.cuda import comm; [[a, b]] = comm.broadcast_coalesced([torch.ones(2), torch.zeros(1)], ['cuda:0']); "
        "assert a.is_cuda and b.tolist() == [0]",
    "torch.cuda.comm.reduce_add":
        "from torch.cuda import comm; a = torch.ones(2).cuda(); assert comm.reduce_add([a, a, a]).tolist() == [3, 3]",
    "torch.cuda.comm.reduce_add_coalesced":
        "from torch.cuda import comm; a, b = torch.ones(2).cuda(), torch.ones(1).cuda(); "
        "s, t = comm.reduce_add_coalesced([[a, b], [a, b]], 0); assert s.tolist() == [2, 2] and t.tolist() == [2]",
    "torch.cuda.comm.scatter":
        "from torch.cuda import comm; [a, b] = comm.scatter(torch.arange(5), [0, 0], [2, 3]); "
        "assert a.is_cuda and a.tolist() == [0, 1] and b.tolist() == [2, 3, 4]",
    "torch.cuda.comm.gather":
        "from torch.cuda import comm; a = torch.ones(2).cuda(); b = comm.gather([a, a], destination='cpu'); "
        "assert b.device.type == 'cpu' and len(b) == 4 and comm.gather([a, a]).is_cuda",
    "torch.cuda.MemPool": "torch.cuda.MemPool()",
    "torch.cuda.use_mem_pool": "with torch.cuda.use_mem_pool(torch.cuda.MemPool()): torch.ones(2, device='cuda')",
    "torch.cuda.OutOfMemoryError": "assert issubclass(torch.cuda.OutOfMemoryError, RuntimeError)",
    # Random numbers
    "torch.cuda.manual_seed":
        "torch.cuda.manual_seed(1); a = torch.randn(2, device='cuda'); torch.cuda.manual_seed(1); "
        "assert torch.equal(a, torch.randn(2, device='cuda'))",
    "torch.cuda.manual_seed_all": "torch.cuda.manual_seed_all(1)",
    "torch.cuda.get_rng_state": "assert torch.cuda.get_rng_state().dtype is torch.uint8",
    "torch.cuda.set_rng_state": "torch.cuda.set_rng_state(torch.cuda.get_rng_state())",
    "torch.cuda.get_rng_state_all": "assert len(torch.cuda.get_rng_state_all()) == torch.cuda.device_count()",
    "torch.cuda.set_rng_state_all": "torch.cuda.set_rng_state_all(torch.cuda.get_rng_state_all())",
    "torch.cuda.random.get_rng_state": "torch.cuda.random.get_rng_state()",
    "torch.cuda.random.get_rng_state_all": "torch.cuda.random.get_rng_state_all()",
    "torch.cuda.initial_seed": "torch.cuda.manual_seed(5); assert torch.cuda.initial_seed() == 5",
    "torch.cuda.default_generators": "assert len(torch.cuda.default_generators) >= 1",
    # Mixed precision
    "torch.autocast(<variable device_type>)":
        "kind = 'cuda'\nwith torch.autocast(kind, torch.bfloat16): "
        "assert (torch.ones(2, 2).cuda() @ torch.ones(2, 2).cuda()).dtype is torch.bfloat16",
    "torch.autocast('cuda')":
        "with torch.autocast('cuda'): "
        "assert (torch.ones(2, 2).cuda() @ torch.ones(2, 2).cuda()).dtype is torch.float16",
    "torch.cuda.amp.autocast":
        "with torch.cuda.amp.autocast(): "
        "assert (torch.ones(2, 2).cuda() @ torch.ones(2, 2).cuda()).dtype is torch.float16",
    "torch.cuda.amp": "assert torch.cuda.amp.autocast and torch.cuda.amp.GradScaler",
    "torch.cuda.amp.GradScaler": "s = torch.cuda.amp.GradScaler(); assert s.is_enabled() and s.get_scale() > 1; train(s)",
    "torch.amp.GradScaler('cuda')": "train(torch.amp.GradScaler('cuda'))",
    "torch.amp.GradScaler(other)": "train(torch.amp.GradScaler())",
    "torch.cuda.amp.custom_fwd": "square(torch.cuda.amp.custom_fwd, torch.cuda.amp.custom_bwd)",
    "torch.cuda.amp.custom_bwd": "square(torch.cuda.amp.custom_fwd, torch.cuda.amp.custom_bwd)",
    # Backends
    "torch.backends.cudnn": "torch.backends.cudnn.enabled = True; assert torch.backends.cudnn.enabled",
    "torch.backends.cudnn.benchmark": "torch.backends.cudnn.benchmark = True; assert torch.backends.cudnn.benchmark",
    "torch.backends.cudnn.deterministic":
        "torch.backends.cudnn.deterministic = True; assert torch.backends.cudnn.deterministic",
    "torch.backends.cudnn.allow_tf32": "torch.backends.cudnn.allow_tf32 = True",
    "torch.backends.cuda.matmul.allow_tf32":
        "torch.backends.cuda.matmul.allow_tf32 = True; assert torch.backends.cuda.matmul.allow_tf32",
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction":
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False",
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction":
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
    "torch.backends.cuda.enable_flash_sdp": "torch.backends.cuda.enable_flash_sdp(True)",
    "torch.backends.cuda.enable_mem_efficient_sdp": "torch.backends.cuda.enable_mem_efficient_sdp(True)",
    "torch.backends.cuda.preferred_linalg_library":
        "f = torch.backends.cuda.preferred_linalg_library; f('cusolver'); assert 'usolver' in str(f())",
    "torch.backends.cuda.preferred_blas_library":
        "f = torch.backends.cuda.preferred_blas_library; f('cublaslt'); assert 'ublaslt' in str(f())",
    "torch.backends.cuda.cufft_plan_cache":
        "c = torch.backends.cuda.cufft_plan_cache; c.clear(); c.max_size = 8; assert (c.size, c[0].max_size) == (0, 8)",
    "torch.set_float32_matmul_precision": "torch.set_float32_matmul_precision('high')",
    "optimizer fused=True":
        "m = torch.nn.Linear(2, 2).cuda(); o = torch.optim.AdamW(m.parameters(), fused=True); "
        "m(torch.ones(1, 2).cuda()).sum().backward(); o.step()",
    "torch.compile":
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2).cuda()).device.type == 'cuda'",
    "torch.jit.script": "assert torch.jit.script(scripted)(torch.ones(2).cuda()).is_cuda",
    # Distributed
    "init_process_group(nccl)": "group('nccl')",
    "init_process_group(variable/default backend)": "name = 'cpu:gloo,cuda:nccl'; group(name)",
    "init_process_group(gloo)": "group('gloo')",
    "new_group(variable/default backend)": "group('nccl', lambda: dist.new_group([0], backend=None))",
    "new_group(nccl)": "group('nccl', lambda: dist.new_group([0], backend='nccl'))",
    "new_group(gloo)": "group('nccl', lambda: dist.new_group([0], backend='gloo'))",
    "torch.distributed.get_backend": "group('nccl', lambda: check(dist.get_backend() == 'nccl'))",
    "torch.distributed.get_backend_config":
        "group('nccl', lambda: check(dist.get_backend_config() == 'cuda:nccl')); "
        "group('cpu:gloo,cuda:nccl', lambda: check(dist.get_backend_config() == 'cpu:gloo,cuda:nccl'))",
    "backend comparison  (== 'nccl')": "group('nccl', lambda: check(dist.get_backend() == dist.Backend.NCCL))",
    "torch.distributed.is_nccl_available": "assert dist.is_nccl_available()",
    "torch.nn.parallel.DistributedDataParallel": "group('nccl', lambda: ddp())",
    "DDP(device_ids=...) kwarg": "group('nccl', lambda: ddp(device_ids=[0], output_device=0))",
    "init_device_mesh('cuda')": "group('nccl', lambda: check(mesh('cuda').device_type))",
    "init_device_mesh(var)": "kind = 'cuda'; group('nccl', lambda: mesh(kind))",
    "torch.cuda.nccl": "assert torch.cuda.nccl.version()",
    "torch.cuda.nccl.version": "assert torch.cuda.nccl.version() >= (2, 0, 0)",
    # The accelerator's door
    "torch.accelerator.current_accelerator": "assert torch.accelerator.current_accelerator().type == 'cuda'",
    "torch.accelerator.is_available": "assert torch.accelerator.is_available()",
    "torch.accelerator.device_count": "assert torch.accelerator.device_count() >= 1",
    "torch.accelerator.set_device_index": "torch.accelerator.set_device_index(0)",
    "torch.accelerator.device_index": "with torch.accelerator.device_index(0): assert torch.ones(2, device='cuda').is_cuda",
    "torch.accelerator.current_stream": "torch.accelerator.current_stream().synchronize()",
    # Profiling, debugging, the driver
    "torch.cuda.nvtx.range_push": "torch.cuda.nvtx.range_push('a'); torch.cuda.nvtx.range_pop()",
    "torch.cuda.nvtx.range_pop": "torch.cuda.nvtx.range_push('a'); torch.cuda.nvtx.range_pop()",
    "torch.cuda.nvtx.range": "with torch.cuda.nvtx.range('a'): pass",
    "torch.cuda.cudart": "torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())",
    "torch.cuda.check_error": "torch.cuda.check_error(0)",
    "torch.cuda.set_sync_debug_mode": "torch.cuda.set_sync_debug_mode('warn'); torch.cuda.set_sync_debug_mode(0)",
    "torch.cuda.get_sync_debug_mode": "assert torch.cuda.get_sync_debug_mode() == 0",
    "torch.cuda._sleep": "torch.cuda._sleep(10)",
    "torch.cuda.utilization": "torch.cuda.utilization()",
    "torch.cuda.temperature": "torch.cuda.temperature()",
    "torch.cuda.power_draw": "torch.cuda.power_draw()",
    "torch.cuda.clock_rate": "torch.cuda.clock_rate()",
    "torch.cuda._compile_kernel": "torch.cuda._compile_kernel('__global__ void f() {}', 'f')",
    # What no device but CUDA has
    "torch.cuda.tunable.enable":
        "assert not torch.cuda.tunable.is_enabled(); torch.cuda.tunable.enable(); assert torch.cuda.tunable.is_enabled()",
    "torch.cuda.tunable.set_max_tuning_duration":
        "torch.cuda.tunable.set_max_tuning_duration(7); assert torch.cuda.tunable.get_max_tuning_duration() == 7",
    "torch.cuda.tunable.set_filename":
        "torch.cuda.tunable.set_filename('f.csv'); assert torch.cuda.tunable.get_filename() == 'f.csv'",
    "torch.cuda.tunable.get_results": "assert torch.cuda.tunable.get_results() == ()",
    "torch.cuda.tunable.read_file": "assert torch.cuda.tunable.read_file('f.csv') is False",
    "torch.cuda.tunable.tune_gemm_in_file": "torch.cuda.tunable.tune_gemm_in_file('f.csv')",
    "torch.cuda.jiterator._create_jit_fn":
        "torch.cuda.jiterator._create_jit_fn('template <typename T> T f(T x) { return x; }')",
    "torch.cuda.gds.GdsFile": "torch.cuda.gds.GdsFile('f', os.O_RDONLY)",
    "torch.cuda.green_contexts.GreenContext": "torch.cuda.GreenContext.create(1)",
    "torch.cuda.current_solver_handle": "torch.cuda.current_solver_handle()",
    "torch.cuda.nccl.all_reduce": "torch.cuda.nccl.all_reduce([torch.ones(2).cuda()])",
    "torch.cuda.memory.list_gpu_processes": "torch.cuda.memory.list_gpu_processes()",
    "torch.cuda.graphs.graph_pool_handle": "torch.cuda.graphs.graph_pool_handle()",
    "torch.cuda._graph_annotations": "torch.cuda._graph_annotations",
    "torch.cuda._annotate_cuda_graph_trace": "torch.cuda._annotate_cuda_graph_trace",
    "torch._C._cuda*": "torch._C._cuda_getCurrentRawStream(0)",
}  # fmt: skip
"""By the row of the count: what to do, in Python. `torch`, `dist`, `tmp` and the functions below are there."""


def check(true):
    assert true


def train(scaler):
    model = torch.nn.Linear(2, 2).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler.scale(model(torch.ones(1, 2).cuda()).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def square(for_forward, for_backward):
    class Square(torch.autograd.Function):
        @staticmethod
        @for_forward
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @for_backward
        def backward(ctx, upstream):
            return 2 * ctx.saved_tensors[0] * upstream

    x = torch.ones(2, device="cuda", requires_grad=True)
    Square.apply(x).sum().backward()
    assert torch.equal(x.grad, 2 * torch.ones(2).cuda())


def scripted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros(2, device="cuda")


def group(backend, action=lambda: None):
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            on = torch.ones(2).cuda() if "nccl" in backend else torch.ones(2)
            dist.all_reduce(on)
            action()
        finally:
            dist.destroy_process_group()


def ddp(**options):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2).cuda(), **options)
    model(torch.ones(1, 2).cuda()).sum().backward()


def mesh(kind):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (1,))


def attempt(code, names):
    """Return what an exercise raised, or nothing."""
    try:
        exec(compile(code, "<exercise>", "exec"), dict(names))
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return ""


def main():
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        names = {**globals(), "tmp": Path(folder)}
        found = {api: attempt(code, names) for api, code in EXERCISES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
