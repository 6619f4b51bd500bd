# SPDX-License-Identifier: Apache-2.0
"""Memory of Ascend NPUs: torch_npu has the same statistics as torch.cuda, and more ways to run out."""

from __future__ import annotations

import re
from typing import final

from hal.memory import requested_bytes
from hal.torch_memory import TorchMemory

# The allocator raises torch.OutOfMemoryError; the runtime's and the collectives' workspaces raise a plain RuntimeError
# with one of these codes: ACL_ERROR_RT_MEMORY_ALLOCATION (207001), ACL_ERROR_BAD_ALLOC (200000), HCCL's EL0004 and
# EI0007. A bare number may be a size, so it counts only where it is called a code or a result.
_CODES = re.compile(
    r"NPU out of memory|\b(?:EL0004|EI0007)\b"
    r"|\b(?:code|result|ret|return|err(?:or|no)?)\b\W{0,3}(?:is\b)?\W{0,3}(?:207001|200000)\b",
    re.IGNORECASE,
)


@final
class AscendMemory(TorchMemory):
    """The caching allocator of torch_npu."""

    def _out_of_memory(self, error: Exception) -> tuple[int | None] | None:
        if isinstance(error, RuntimeError) and _CODES.search(str(error)):
            return (requested_bytes(str(error)),)
        return super()._out_of_memory(error)
