# SPDX-License-Identifier: Apache-2.0
"""Precision of NVIDIA GPUs: TF32 in cuBLAS, cuDNN's convolutions and recurrent networks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hal.changes import Changes, Switch, environment_switch
from hal.errors import UnsupportedPrecision
from hal.fp32_switch import fp32_switch, has_fp32_switches, own_value
from hal.precision import Fp32Mode, Precision, attribute_switch
from hal.support_table import SupportTable

if TYPE_CHECKING:
    import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS is reproducible (its documentation, "Results reproducibility"); torch asks for one."""


class CudaPrecision(Precision):
    """torch 2.9 and later have `fp32_precision`; earlier ones `allow_tf32`. The two must never be mixed.

    After one write through the new interface, reading the old one raises; so only one is ever touched.
    """

    override: ClassVar[tuple[str, ...]] = ("NVIDIA_TF32_OVERRIDE",)
    """Variables that overrule every switch when they are "0": TF32 is off, whatever the switches say."""
    workspace: ClassVar[bool] = True
    """Whether the library's results are reproducible only with a fixed workspace, as cuBLAS's are."""

    def __init__(self, device_id: str, torch_device: torch.device, changes: Changes, support: SupportTable) -> None:
        super().__init__(device_id, torch_device, changes, support)
        if self.workspace and os.environ.get(WORKSPACE, FIXED[0]) == FIXED[0]:
            # torch looks once, at the process's first product, and refuses every deterministic one afterwards if it was
            # not set (Context.cpp, `alertCuBLASConfigNotDeterministic`). `deterministic()` would come too late, as the
            # float32 measurement alone multiplies. It costs up to 24 MiB; on Hopper it is the default size.
            changes.set_environment(WORKSPACE, FIXED[0])

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        import torch

        if mode == "bf16x3":
            raise UnsupportedPrecision(
                f"torch {torch.__version__} offers no three-pass bfloat16 mode here", device=self.device_id, what=mode
            )
        for variable in self.override:
            if mode == "tf32" and os.environ.get(variable) == "0":
                raise UnsupportedPrecision(
                    f"{variable}=0 switches TF32 off, whatever torch's switches say", device=self.device_id, what=mode,
                    hint=f"unset {variable}",
                )  # fmt: skip
        if has_fp32_switches():
            matmul = fp32_switch("cuda", "matmul", "torch.backends.cuda.matmul.fp32_precision")
            return [(matmul, mode), *((switch, mode) for switch in _cudnn_switches())]
        blas: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        allowed = mode == "tf32"
        return [
            (attribute_switch(blas, "allow_tf32", "torch.backends.cuda.matmul.allow_tf32"), allowed),
            (attribute_switch(cudnn, "allow_tf32", "torch.backends.cudnn.allow_tf32"), allowed),
        ]

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        import torch

        given = os.environ.get(WORKSPACE)
        fixed = (environment_switch(WORKSPACE), given if given in FIXED else FIXED[0])
        return [
            *([fixed] if self.workspace else []),
            # Candidates that are timed anew in each run may be chosen differently.
            (attribute_switch(torch.backends.cudnn, "benchmark", "torch.backends.cudnn.benchmark"), False),
        ]


def _cudnn_switches() -> list[Switch]:
    """Return the switches that decide for convolutions and recurrent networks.

    Until it is set, each follows cuDNN's common switch, and reads "tf32" where that says nothing: a state of its own in
    torch (`Float32Precision::DEFAULT`, ATen/Context.h) that no Python call brings back once it is overwritten. So the
    common switch is set for those that follow it.
    """
    common = fp32_switch("cuda", "all", "torch.backends.cudnn.fp32_precision")
    switches: dict[str, Switch] = {}
    for part in ("conv", "rnn"):
        follows = own_value("cuda", part) == "none"
        switch = common if follows else fp32_switch("cuda", part, f"torch.backends.cudnn.{part}.fp32_precision")
        switches[switch.name] = switch
    return list(switches.values())
