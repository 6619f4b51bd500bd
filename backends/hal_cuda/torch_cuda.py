# SPDX-License-Identifier: Apache-2.0
"""What all chips that answer to `torch.cuda` share, whoever makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from hal.allocator_plan import AllocatorPlan
from hal.backend import DeviceInfo
from hal.changes import Changes, Switch
from hal.errors import Absent
from hal.memory import Memory
from hal.precision import Precision, attribute_switch
from hal.support_table import SupportTable
from hal.torch_backend import TorchBackend
from hal_cuda.allocator import allocator_environment
from hal_cuda.build import TorchBuild, torch_build
from hal_cuda.machine import Machine
from hal_cuda.memory import CudaMemory
from hal_cuda.precision import CudaPrecision

if TYPE_CHECKING:
    import torch


class TorchCudaBackend(TorchBackend):
    """A backend over `torch.cuda`. One for a maker says how its chips are recognised, and what they promise."""

    torch_type = "cuda"
    distributed_name = "nccl"
    allocator_variable: ClassVar[str] = "PYTORCH_CUDA_ALLOC_CONF"
    """The allocator's variable in this maker's build of torch, beside the unified one."""
    precision_type: ClassVar[type[CudaPrecision]] = CudaPrecision

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()

    def build(self) -> TorchBuild:
        """Return what the installed torch was built for.

        Raises:
            Absent: there is no torch.
        """
        build = torch_build()
        if build is None:
            raise Absent("torch is not installed", device=self.name)
        return build

    def opened(self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes) -> None:
        """See `TorchBackend.opened`: products of 16-bit numbers are summed in float32, as the contracts promise.

        By default torch lets the library add the partial sums of a split product in 16 bits.
        """
        import torch

        matmul: Any = torch.backends.cuda.matmul
        for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
            changes.set(*_exact_reduction(matmul, name))
        name = "allow_fp16_accumulation"
        if hasattr(matmul, name):  # torch 2.7
            changes.set(attribute_switch(matmul, name, f"torch.backends.cuda.matmul.{name}"), False)

    def make_memory(self, info: DeviceInfo, device: torch.device, module: Any) -> Memory:
        """See `TorchBackend.make_memory`."""
        return CudaMemory(info.id, device, module)

    def make_precision(
        self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes, support: SupportTable
    ) -> Precision:
        """See `TorchBackend.make_precision`."""
        return self.precision_type(info.id, device, changes, support)

    def allocator_environment(self, plan: AllocatorPlan, environ: Mapping[str, str]) -> Mapping[str, str]:
        """See `Backend.allocator_environment`."""
        return allocator_environment(plan, environ, self.allocator_variable, torch_build())


def _exact_reduction(matmul: Any, name: str) -> tuple[Switch, object]:
    """Return the switch that lets partial sums be added in 16 bits, and its value for not.

    Newer versions of torch keep a second setting beside it, whether a product may be split at all. Both are written by
    one assignment, and the second would fall back to its default if it were not written, too.
    """
    shown, splits = f"torch.backends.cuda.matmul.{name}", f"{name}_split_k"
    if not hasattr(matmul, splits):
        return attribute_switch(matmul, name, shown), False
    pair = Switch(
        shown,
        read=lambda: (getattr(matmul, name), getattr(matmul, splits)),
        write=lambda value: setattr(matmul, name, value),
    )
    return pair, (False, getattr(matmul, splits))
