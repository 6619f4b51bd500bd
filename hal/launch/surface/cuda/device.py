# SPDX-License-Identifier: Apache-2.0
"""torch.cuda: which devices there are, which is current, what they are, and waiting for them."""

from __future__ import annotations

import contextlib
import uuid
from types import TracebackType
from typing import Any, Literal, final

from hal.launch.api import active, api, count_made, refused, value
from hal.launch.redirection import Redirection, is_number

CAPABILITY = (8, 0)
"""The compute capability that programs are told: the oldest with bfloat16, so that they choose what runs everywhere."""

CUDA_VERSION = "12.8"
"""The CUDA version that programs are told; libraries look for it before they believe in a GPU."""


@api("torch.cuda.is_available", "torch.cuda._is_compiled", "torch.backends.cuda.is_built", belief=True)
def is_available(r: Redirection) -> bool:
    """There are devices, unless CUDA_VISIBLE_DEVICES hides them."""
    return bool(r.devices)


@api("torch.cuda.device_count", belief=True)
def device_count(r: Redirection) -> int:
    """On a CPU as many as there are processes of this run on this host, so that each has one of its own."""
    return len(r.devices)


@api("torch.cuda.is_initialized")
def is_initialized(r: Redirection) -> bool:
    """The devices are open."""
    return True


@api("torch.cuda.init", "torch.cuda._lazy_init")
def init(r: Redirection) -> None:
    """The devices are open."""


@api("torch.cuda._lazy_call")
def lazy_call(r: Redirection, function: Any, **kwargs: Any) -> None:
    """Call at once: the devices are open."""
    function()


@api("torch.cuda._is_in_bad_fork", "torch._C._cuda_isInBadFork")
def is_in_bad_fork(r: Redirection) -> bool:
    """Whether a device was opened before this process was forked, and cannot be used in it."""
    return bool(getattr(r.module, "_is_in_bad_fork", lambda: False)())


@api("torch.cuda.current_device", "torch.accelerator.current_device_index", "torch.accelerator.current_device_idx")
def current_device(r: Redirection) -> int:
    """The current index; where the program sees no device, CUDA's error."""
    return r.checked(r.current)


@api("torch.cuda._utils._get_device_index", "torch.cuda._get_device_index")
def _get_cuda_index(r: Redirection, device: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    """The index of a CUDA device, or of the host where that may be; of no other device."""
    import torch

    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device) and device.type not in ("cuda", "cpu"):
        raise ValueError(f"Expected a cuda {'or cpu ' if allow_cpu else ''}device, but got: {device}")
    return _get_device_index(r, device, optional, allow_cpu)


@api("torch._utils._get_device_index")
def _get_device_index(r: Redirection, device: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    """The index that is meant, which libraries ask for as torch's own data parallel model does."""
    import torch

    if isinstance(device, str):
        device = torch.device(device)
    device = getattr(device, "idx", device)  # of `torch.cuda.device`
    if isinstance(device, int) or is_number(device):
        return int(device)
    if r.is_host(device):
        if allow_cpu:
            return -1
        raise ValueError(f"Expected a cuda device, but got: {device}")
    index: int | None = getattr(device, "index", None)
    if index is None and not optional:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    return r.current if index is None else index


@api("torch._utils._get_all_device_indices")
def _get_all_device_indices(r: Redirection) -> list[int]:
    """All of them."""
    return list(range(len(r.devices)))


@api("torch._utils._get_current_device_index")
def _get_current_device_index(r: Redirection) -> int:
    """As `torch.cuda.current_device`."""
    return current_device(r)


@api("torch.cuda.set_device")
def set_device(r: Redirection, device: Any) -> None:
    """Make a device current in this thread. As on CUDA, a negative index changes nothing."""
    if isinstance(device, int) and device < 0:
        return
    r.current = cuda_index(r, device)


@api("torch.accelerator.set_device_index", "torch.accelerator.set_device_idx")
def set_device_index(r: Redirection, device: Any, /) -> None:
    """As `torch.cuda.set_device`."""
    set_device(r, device)


def cuda_index(r: Redirection, device: Any) -> int:
    """Return the index of a CUDA device.

    Raises:
        ValueError: it is another kind of device; torch raises this, too.
    """
    index = r.index(device)
    if index is None:
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return index


@api("torch.cuda._exchange_device", "torch.cuda._maybe_exchange_device")
def exchange_device(r: Redirection, device: int) -> int:
    """Make a device current, and return which was; a negative index changes nothing."""
    before = r.current
    if device >= 0:
        r.current = device
    return before


@value("torch.cuda.device", "torch.accelerator.device_index")
def device_context(r: Redirection) -> type:
    """The context manager that makes a device current."""
    return CudaDevice


@value("torch.cuda.device_of")
def device_of_context(r: Redirection) -> type:
    """The context manager that makes a tensor's device current."""
    return CudaDeviceOf


class CudaDevice:
    """Makes a CUDA device current inside a block; None and negative indices change nothing."""

    def __init__(self, device: Any) -> None:
        count_made("torch.cuda.device")
        self.idx = -1
        r = active()
        if r is not None and device is not None and not (isinstance(device, int) and device < 0):
            self.idx = cuda_index(r, device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        r = active()
        if r is not None and self.idx >= 0:
            self.prev_idx, r.current = r.current, self.idx

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        r = active()
        if r is not None and self.prev_idx >= 0:
            r.current = self.prev_idx
        return False


@final
class CudaDeviceOf(CudaDevice):
    """Makes the device of a tensor current inside a block, if it is a CUDA device."""

    def __init__(self, tensor: Any) -> None:
        count_made("torch.cuda.device_of")
        r = active()
        on_cuda = r is not None and tensor.device.type == r.type and (r.hosts is None or tensor not in r.hosts)
        super().__init__(r.present(tensor.device) if on_cuda else None)  # type: ignore[union-attr]


@api("torch.cuda.synchronize", "torch.accelerator.synchronize", forwards=True)
def synchronize(r: Redirection, device: Any = None) -> None:
    """Wait for a device."""
    r.devices[cuda_index(r, device)].synchronize()


@final
class CudaDeviceProperties:
    """What `torch.cuda.get_device_properties` returns. A property that this device has not is an AttributeError.

    Attributes:
        name: of the true device.
        major, minor: of the compute capability that programs are told.
        total_memory: bytes.
        multi_processor_count: of a CPU, its processors.
        uuid: made of the device's id; the same in every process of this host.
    """

    def __init__(self, r: Redirection, index: int) -> None:
        info = r.devices[index].info
        self.name = info.name or info.id
        self.major, self.minor = CAPABILITY
        self.total_memory = int(r.devices[index].memory.stats().total or info.total_memory or 0)
        self.multi_processor_count = _processors(r)
        self.uuid = uuid.uuid5(uuid.NAMESPACE_OID, f"{info.id}/{index}/{uuid.getnode()}")
        self.is_integrated = r.hosts is not None
        self.is_multi_gpu_board = False
        self.warp_size = 32
        self.regs_per_multiprocessor = 65536
        self.max_threads_per_multi_processor = 2048
        self.shared_memory_per_block = 49152
        self.shared_memory_per_block_optin = 166912
        self.shared_memory_per_multiprocessor = 167936
        self.L2_cache_size = 41943040
        self.gcnArchName = ""
        self.max_threads_per_block = 1024
        # In kHz and bits, of the card that the capability makes programs think of: they compute a bandwidth by them.
        self.clock_rate, self.memory_clock_rate, self.memory_bus_width = 1410000, 1215000, 5120
        self.pci_bus_id, self.pci_device_id, self.pci_domain_id = index, 0, 0

    def __repr__(self) -> str:
        return (
            f"_CudaDeviceProperties(name={self.name!r}, major={self.major}, minor={self.minor}, "
            f"total_memory={self.total_memory // 2**20}MB, multi_processor_count={self.multi_processor_count})"
        )


def _processors(r: Redirection) -> int:
    if r.hosts is not None:
        import torch

        return int(torch.get_num_threads())
    properties = getattr(r.module, "get_device_properties", lambda _: None)(r.targets[r.current])
    return int(getattr(properties, "multi_processor_count", 0) or 1)


@api("torch.cuda.get_device_properties", verdict="emulated", belief=True,
     note=f"the true name and memory; compute capability {CAPABILITY[0]}.{CAPABILITY[1]}")  # fmt: skip
def get_device_properties(r: Redirection, device: Any = None) -> CudaDeviceProperties:
    """Name and memory of the true device, and the rest as of a device of that capability."""
    return _properties(cuda_index(r, device))


def _properties(index: int) -> CudaDeviceProperties:
    r = active()
    assert r is not None  # whoever asks has it
    return CudaDeviceProperties(r, index)


_properties._dynamo_marked_constant = True  # type: ignore[attr-defined]  # compiled code is told once, as on CUDA


@api("torch.cuda.get_device_name")
def get_device_name(r: Redirection, device: Any = None) -> str:
    """The true device's name."""
    return get_device_properties(r, device).name


@api("torch.cuda.get_device_capability", verdict="emulated", belief=True, note="8.0 on every device")
def get_device_capability(r: Redirection, device: Any = None) -> tuple[int, int]:
    """See `CAPABILITY`."""
    cuda_index(r, device)
    return CAPABILITY


@api("torch.cuda.get_arch_list", verdict="emulated", belief=True)
def get_arch_list(r: Redirection) -> list[str]:
    """The architecture of that capability."""
    return [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"]


@api("torch.cuda.get_gencode_flags", verdict="emulated")
def get_gencode_flags(r: Redirection) -> str:
    """The compiler's flags for that capability."""
    digits = f"{CAPABILITY[0]}{CAPABILITY[1]}"
    return f"-gencode compute=compute_{digits},code=sm_{digits}"


@api("torch.cuda.is_bf16_supported", belief=True)
def is_bf16_supported(r: Redirection, including_emulation: bool = True) -> bool:
    """Whether the device multiplies matrices of bfloat16, found by trying."""
    return _multiplies_bf16()


def _multiplies_bf16() -> bool:
    import torch

    r = active()
    return r is not None and r.device.support("matmul", torch.bfloat16).status != "unsupported"


_multiplies_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


@api("torch.cuda.is_tf32_supported", verdict="emulated", belief=True)
def is_tf32_supported(r: Redirection) -> bool:
    """False: what the switches of TF32 do here is told by `hal doctor`, and is not NVIDIA's format."""
    return False


@api("torch.cuda.can_device_access_peer", verdict="emulated")
def can_device_access_peer(r: Redirection, device: Any, peer_device: Any) -> bool:
    """Devices that share the host's memory can; of others it is not known."""
    return r.hosts is not None and cuda_index(r, device) != cuda_index(r, peer_device)


@value("torch.version.cuda", verdict="emulated", belief=True, note=f"{CUDA_VERSION} on every device")
def version(r: Redirection) -> str:
    """See `CUDA_VERSION`."""
    return CUDA_VERSION


@value("torch.version.hip", belief=True)
def hip_version(r: Redirection) -> None:
    """None: programs that see a CUDA device ask for this to tell AMD's from it."""
    return


@api("torch.backends.cudnn.is_available", verdict="emulated", belief=True)
def cudnn_is_available(r: Redirection) -> bool:
    """True, as its version says; convolutions are the device's own."""
    return True


@api("torch.backends.cudnn.version", verdict="emulated", belief=True, note="9.7.1 on every device")
def cudnn_version(r: Redirection) -> int:
    """That of the CUDA which programs are told."""
    return 90701


@api("torch.cuda.ipc_collect", verdict="emulated")
def ipc_collect(r: Redirection) -> None:
    """There is no memory of other processes to give back."""


@api("torch.cuda.set_sync_debug_mode", verdict="emulated", note="kept and given back; nothing warns of synchronising")
def set_sync_debug_mode(r: Redirection, debug_mode: int | str) -> None:
    """Keep the mode; nothing warns of it."""
    names = {"default": 0, "warn": 1, "error": 2}
    if debug_mode not in (*names, *names.values()):
        raise RuntimeError("invalid value of debug_mode, expected one of `default`, `warn`, `error`")
    r.kept["get_sync_debug_mode"] = names.get(debug_mode, debug_mode)  # type: ignore[arg-type]
    if r.kept["get_sync_debug_mode"]:
        r.idle("torch.cuda.set_sync_debug_mode", "calls that wait for the device are not watched")


@api("torch.cuda.get_sync_debug_mode", verdict="emulated")
def get_sync_debug_mode(r: Redirection) -> int:
    """What was set."""
    return int(r.kept.get("get_sync_debug_mode", 0))


@api("torch.cuda.check_error", verdict="emulated")
def check_error(r: Redirection, res: int) -> None:
    """Raise for an error code of the CUDA runtime; nothing here returns one but what `cudart` gives."""
    if res != 0:
        raise RuntimeError(f"CUDA error: {res}")


@final
class CudaRuntime:
    """What `torch.cuda.cudart()` returns: the calls that training code makes of it."""

    class cudaError:
        """Error codes."""

        success = 0

    cudaStreamLegacy = 1

    def cudaProfilerStart(self) -> int:
        """Nothing is to be started: no CUDA profiler is attached."""
        return _no_profiler("torch.cuda.cudart().cudaProfilerStart")

    def cudaProfilerStop(self) -> int:
        """See `cudaProfilerStart`."""
        return _no_profiler("torch.cuda.cudart().cudaProfilerStop")

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:
        """Bytes that are free, and all."""
        r = active()
        if r is None:
            raise RuntimeError("the redirection that gave this runtime has ended")
        stats = r.devices[r.checked(device)].memory.stats()
        return stats.free or 0, stats.total or 0

    def __getattr__(self, name: str) -> Any:
        r = active()
        if name.startswith("__") or r is None:
            raise AttributeError(name)
        raise r.refuse(f"torch.cuda.cudart().{name}", "there is no CUDA runtime on this device")


def _no_profiler(name: str) -> int:
    r = active()
    if r is not None:
        r.idle(name, "no CUDA profiler is attached; torch.profiler works")
    return 0


@api("torch.cuda.cudart", verdict="emulated", note="cudaProfilerStart and -Stop do nothing, cudaMemGetInfo works")
def cudart(r: Redirection) -> CudaRuntime:
    """See `CudaRuntime`."""
    return CudaRuntime()


@api("torch.cuda.profiler.start", "torch.cuda.profiler.stop", verdict="emulated", note="does nothing")
def profiler_switch(r: Redirection) -> None:
    """No CUDA profiler is attached."""
    r.idle("torch.cuda.profiler", "no CUDA profiler is attached; torch.profiler works")


@api("torch.cuda.profiler.profile", verdict="emulated", note="does nothing")
def profiler_block(r: Redirection) -> contextlib.AbstractContextManager[None]:
    """No CUDA profiler is attached."""
    r.idle("torch.cuda.profiler", "no CUDA profiler is attached; torch.profiler works")
    return contextlib.nullcontext()


@api("torch.cuda._sleep", verdict="emulated")
def sleep(r: Redirection, cycles: int) -> None:
    """Sleep as long as a clock of 1 GHz takes for so many cycles."""
    import time

    time.sleep(cycles / 1e9)


refused(
    "torch.cuda.utilization", "torch.cuda.temperature", "torch.cuda.power_draw", "torch.cuda.clock_rate",
    "torch.cuda.memory_usage", "torch.cuda.list_gpu_processes", "torch.cuda.memory.list_gpu_processes",
    why="the driver of this device is not asked for it", hint="programs that log it catch the error",
)  # fmt: skip
refused(
    "torch.cuda._compile_kernel", "torch.cuda.current_blas_handle", "torch.cuda.current_solver_handle",
    "torch.cuda.jiterator._create_jit_fn", "torch.cuda.jiterator._create_multi_output_jit_fn",
    why="it is CUDA's own", hint="a version of this code without CUDA kernels",
)  # fmt: skip
refused(
    "torch.cuda.gds.GdsFile", "torch.cuda.gds.gds_register_buffer", "torch.cuda.gds.gds_deregister_buffer",
    why="GPUDirect Storage reads files into a GPU's own memory", hint="torch.save and torch.load",
)  # fmt: skip

_NO_PARTS = "the processors of this device cannot be parted"


@final
class GreenContext:
    """A class of which there is no object."""

    @staticmethod
    def create(*args: Any, **kwargs: Any) -> Any:
        """Refuse a part of the device's processors."""
        r = active()
        raise RuntimeError(_NO_PARTS) if r is None else r.refuse("torch.cuda.GreenContext.create", _NO_PARTS)

    max_workqueues = create


@value("torch.cuda.GreenContext", "torch.cuda.green_contexts.GreenContext", verdict="refused", note=_NO_PARTS)
def green_context(r: Redirection) -> type:
    """See `GreenContext`."""
    return GreenContext
