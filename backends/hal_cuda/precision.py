# SPDX-License-Identifier: Apache-2.0
"""Precision of NVIDIA GPUs: TF32 in cuBLAS, cuDNN's convolutions and recurrent networks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from hal.changes import Switch, environment_switch
from hal.errors import UnsupportedPrecision
from hal.precision import Fp32Mode, Precision, attribute_switch


class CudaPrecision(Precision):
    """torch 2.9 and later have `fp32_precision`; earlier ones `allow_tf32`. The two must never be mixed.

    After one write through the new interface, reading the old one raises; so only one is ever touched.
    """

    override: ClassVar[tuple[str, ...]] = ("NVIDIA_TF32_OVERRIDE",)
    """Variables that overrule every switch when they are "0": TF32 is off, whatever the switches say."""

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
        blas: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        if hasattr(getattr(cudnn, "conv", None), "fp32_precision"):
            return [
                (attribute_switch(blas, "fp32_precision", "torch.backends.cuda.matmul.fp32_precision"), mode),
                (attribute_switch(cudnn.conv, "fp32_precision", "torch.backends.cudnn.conv.fp32_precision"), mode),
                (attribute_switch(cudnn.rnn, "fp32_precision", "torch.backends.cudnn.rnn.fp32_precision"), mode),
            ]
        allowed = mode == "tf32"
        return [
            (attribute_switch(blas, "allow_tf32", "torch.backends.cuda.matmul.allow_tf32"), allowed),
            (attribute_switch(cudnn, "allow_tf32", "torch.backends.cudnn.allow_tf32"), allowed),
        ]

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        import torch

        # cuBLAS chooses among streams' workspaces otherwise (cuBLAS documentation, "Results reproducibility"). It
        # reads the variable when its handle is made: call `deterministic()` before the first product.
        given = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        return [
            (environment_switch("CUBLAS_WORKSPACE_CONFIG"), given if given in (":4096:8", ":16:8") else ":4096:8"),
            # Candidates that are timed anew in each run may be chosen differently.
            (attribute_switch(torch.backends.cudnn, "benchmark", "torch.backends.cudnn.benchmark"), False),
        ]
