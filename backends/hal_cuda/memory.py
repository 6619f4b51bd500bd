# SPDX-License-Identifier: Apache-2.0
"""Memory behind `torch.cuda`: its caching allocator, and the other ways to say that memory ran out."""

from __future__ import annotations

import re
from typing import final

from hal.memory import requested_bytes
from hal.torch_memory import TorchMemory

# The allocator raises torch.OutOfMemoryError. The driver, the libraries' workspaces and the collectives do not.
_EXHAUSTED = re.compile(
    r"\b(CUDA|HIP)( driver)? error: out of memory|\b(CUDA|HIP) out of memory"
    r"|\b(CUBLAS|CUSOLVER|CUSPARSE|CUDNN|HIPBLAS)_STATUS_ALLOC_FAILED|\b(Cuda|HIP) failure (\d+ )?'out of memory'"
)


@final
class CudaMemory(TorchMemory):
    """The caching allocator of `torch.cuda`."""

    def _out_of_memory(self, error: Exception) -> tuple[int | None] | None:
        if isinstance(error, RuntimeError) and _EXHAUSTED.search(str(error)):
            return (requested_bytes(str(error)),)
        return super()._out_of_memory(error)
