# SPDX-License-Identifier: Apache-2.0
"""Honest operators through `torch.compile`, which fuses them in its own way; only where there is a C++ compiler."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.parts import OwnProduct


class _Compiled:
    """A function that is compiled when it is called first: making an implementation must cost nothing."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(self, *given: Tensor | float) -> Tensor:
        if self._compiled is None:
            import torch._inductor.config as inductor

            inductor.compile_threads = 1  # a pool of processes that import torch costs more than it saves here
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of its own code as it loads its compiler
                self._compiled = torch.compile(self._function, dynamic=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # and as it compiles
            return self._compiled(*given)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _expert(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    g, u = ((x.float() @ w.float().mT).to(x.dtype) for w in (w1, w3))
    return ((torch.nn.functional.silu(g) * u).float() @ w2.float().mT).to(x.dtype)


class CompiledNorm(Norm):
    """RMSNorm through torch.compile, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self._compiled = _Compiled(_rms_norm)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return self._compiled(x_TD, weight_D, eps)


class CompiledExperts(OwnProduct):
    """The experts through torch.compile, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self._compiled = _Compiled(_expert)

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        return self._compiled(x, w1, w3, w2)


if shutil.which(os.environ.get("CXX", "g++")):
    benign()(CompiledNorm)
    benign()(CompiledExperts)
