# SPDX-License-Identifier: Apache-2.0
"""Process groups, their collectives, and models that are spread over processes."""

from hal.launch.surface.distributed import (
    collectives,
    data_parallel,
    dtensor_attention,
    dtensor_random,
    nccl,
    parallel,
    process_groups,
    sync_batch_norm,
)

__all__ = [
    "collectives",
    "data_parallel",
    "dtensor_attention",
    "dtensor_random",
    "nccl",
    "parallel",
    "process_groups",
    "sync_batch_norm",
]
