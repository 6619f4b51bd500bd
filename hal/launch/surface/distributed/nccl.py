# SPDX-License-Identifier: Apache-2.0
"""NCCL's options: a program sets them, and the library in its place has nothing of the kind."""

from __future__ import annotations

from typing import Any

from hal.launch import api as state
from hal.launch.api import value
from hal.launch.redirection import Redirection


class Options:
    """What a program sets of NCCL; the library in its place has nothing of the kind."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        import types

        self.is_high_priority_stream = is_high_priority_stream
        self.config = types.SimpleNamespace()
        self.global_ranks_in_group: list[int] = []
        self.group_name = ""


class ProcessGroupNCCL:
    """A class that cannot be made, so that its options can."""

    Options = Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        r = state._active
        why = "there is no NCCL on this device"
        raise RuntimeError(why) if r is None else r.refuse("torch.distributed.ProcessGroupNCCL", why)


@value("torch.distributed.ProcessGroupNCCL", "torch.distributed.distributed_c10d.ProcessGroupNCCL", verdict="emulated",
       note="its Options are taken and do nothing")  # fmt: skip
def nccl_group(r: Redirection) -> type:
    """See `ProcessGroupNCCL`."""
    return ProcessGroupNCCL
