# SPDX-License-Identifier: Apache-2.0
"""Ascend NPUs: device files, the vendor's package and its toolkit CANN must all be here, and must fit each other."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal.allocator_plan import AllocatorPlan, merge_allocator_settings
from hal.backend import DeviceInfo
from hal.changes import Changes
from hal.contract import Arithmetic, Contract
from hal.errors import Absent, Broken, ConfigError
from hal.memory import Memory
from hal.precision import Precision
from hal.support_table import SupportTable
from hal.torch_backend import TorchBackend
from hal_ascend.machine import Machine
from hal_ascend.memory import AscendMemory
from hal_ascend.precision import AscendPrecision

if TYPE_CHECKING:
    import torch

FIRST_SERIES = re.compile(r"Ascend910(PremiumA|ProA|ProB|A|B)?")
"""Atlas training cards before A2, whose names have a number behind the B: Ascend910B1 and so on."""

OWN, UNIFIED = "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


class AscendBackend(TorchBackend):
    """NPUs of the Ascend series under torch's device type `npu`."""

    plugin_api = (1, 0)
    name = "ascend"
    vendor = "Huawei"
    torch_type = "npu"
    package = "torch_npu"
    library = "HCCL"
    distributed_name = "hccl"

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """See `TorchBackend.present`.

        Raises:
            Absent: there are no device files.
            Broken: there are, and the software for them is missing or does not fit.
        """
        files = self.machine.files("/dev/davinci[0-9]*")
        installed = importlib.util.find_spec("torch_npu") is not None
        if not files:
            package = "torch_npu is installed" if installed else "torch_npu is not installed"
            raise Absent(f"no /dev/davinci[0-9]*; {package}", device=self.name)
        if not installed:
            raise Broken(
                f"{len(files)} NPUs are here ({files[0]}, ...), and torch_npu is not installed", device=self.name,
                hint="pip install 'moe-hal[ascend]', in the minor version of torch",
            )  # fmt: skip
        versions = {name: self.machine.version(name) for name in ("torch", "torch_npu")}
        minors = {".".join((version or "?").split(".")[:2]) for version in versions.values()}
        if len(minors) > 1:
            raise Broken(
                "torch and torch_npu do not fit: " + ", ".join(f"{n} {v}" for n, v in versions.items()),
                device=self.name, expected="one minor version for both",
            )  # fmt: skip
        toolkit = self.machine.toolkit()
        if toolkit is None:
            raise Broken(
                "NPUs are here, and CANN is not", device=self.name, expected="ASCEND_HOME_PATH",
                hint="source /usr/local/Ascend/ascend-toolkit/set_env.sh",
            )  # fmt: skip
        return self.machine.visible(len(files)), (*files, f"torch_npu {versions['torch_npu']}", f"CANN in {toolkit}")

    def import_hint(self, error: Exception) -> str:
        """See `TorchBackend.import_hint`."""
        if "Two accelerators" in str(error):  # torch_npu/__init__.py: it refuses a torch with another accelerator
            return "a build of torch for the CPU: torch_npu works beside no other accelerator"
        return "source CANN's set_env.sh; `import torch` alone works with TORCH_DEVICE_BACKEND_AUTOLOAD=0"

    def make_contract(self, info: DeviceInfo, device: torch.device, module: Any) -> Contract:
        """See `TorchBackend.make_contract`. No exact arithmetic is published, so the least is promised."""
        chip = str(module.get_device_name(device))
        # The first series multiplies float16 only, and knows saturation instead of infinities.
        first = FIRST_SERIES.fullmatch(chip) is not None
        dtypes = ("float16",) if first else ("float32", "bfloat16", "float16")
        knows = getattr(getattr(module, "utils", None), "is_support_inf_nan", None)
        saturates = first or (knows is not None and not knows())
        return Contract(
            matmul=dict.fromkeys(dtypes, Arithmetic(rounding="truncate")),
            subnormals="unspecified",
            nonfinite="saturate" if saturates else "ieee",
            evidence=f"{chip}: accumulates in float32, by the vendor's documents; its rounding is not published",
            basis="assumed",
        )

    def make_memory(self, info: DeviceInfo, device: torch.device, module: Any) -> Memory:
        """See `TorchBackend.make_memory`."""
        return AscendMemory(info.id, device, module)

    def make_precision(
        self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes, support: SupportTable
    ) -> Precision:
        """See `TorchBackend.make_precision`."""
        return AscendPrecision(info.id, device, changes, support)

    def allocator_environment(self, plan: AllocatorPlan, environ: Mapping[str, str]) -> Mapping[str, str]:
        """See `Backend.allocator_environment`.

        torch_npu refuses to start if both variables are set (NPUAllocatorConfig.cpp), so the one that the user set is
        kept, and only one is ever written.
        """
        if OWN in environ and UNIFIED in environ:
            raise ConfigError(f"{OWN} and {UNIFIED} are both set, which torch_npu refuses", hint=f"unset {UNIFIED}")
        wanted = plan.settings()
        if not wanted:
            return {}
        variable = UNIFIED if UNIFIED in environ else OWN
        return {variable: merge_allocator_settings(variable, environ.get(variable), wanted)}

    def versions(self) -> Mapping[str, str | None]:
        """See `Backend.versions`."""
        return {
            "torch_npu": self.machine.version("torch_npu"),
            "cann": self.machine.toolkit_version(),
            "driver": self.machine.driver_version(),
        }

    def advice(self) -> Sequence[str]:
        """See `Backend.advice`."""
        told = []
        if self.machine.variable(OWN) and self.machine.variable(UNIFIED):
            told.append(f"{OWN} and {UNIFIED} are both set, which torch_npu refuses; unset {UNIFIED}")
        if importlib.util.find_spec("torch_npu") is not None and self.machine.toolkit() is None:
            told.append(
                "torch_npu is installed and CANN is not: `import torch` fails unless TORCH_DEVICE_BACKEND_AUTOLOAD=0"
            )
        return told


backend = AscendBackend()
