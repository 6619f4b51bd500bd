# SPDX-License-Identifier: Apache-2.0
"""Collectives of torch.distributed where gloo stands in for NCCL: what NCCL takes and gloo does not.

NCCL counts elements and sees no shapes: `all_gather_into_tensor` of [2, 3] may fill [12] or [2, 2, 3], where gloo asks
for [4, 3]. It gathers parts of different sizes, makes one call of several, and multiplies before it adds. Libraries
rely on all of these.
"""

from __future__ import annotations

import functools
import inspect
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch import gloo
from hal.launch.api import api
from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.surface.distributed import works

if TYPE_CHECKING:
    import torch

_HOME = "torch.distributed.distributed_c10d"
_SHARDED = "torch.distributed.fsdp._fully_shard._fsdp_collectives"


def install(redirection: Redirection, patches: Patches) -> None:
    """Let works of gloo's end as NCCL's do, and sharded models divide their gradients, for which gloo has no factor."""
    if redirection.hosts is None:
        return
    gloo.install(patches)
    works.install(patches)
    name = "_get_gradient_divide_factors"

    def divide(own: Any) -> None:
        form = inspect.signature(own)

        def factors(*args: Any, **kwargs: Any) -> Any:
            given = form.bind(*args, **kwargs).arguments
            if given.get("factor") is not None and "force_sum_reduction_for_comms" in form.parameters:
                given["force_sum_reduction_for_comms"] = True
            return own(**given)

        patches.set(sys.modules[_SHARDED], name, factors)

    when_loaded(_SHARDED, name, divide)
    when_loaded("torch.distributed.nn.functional", "_AllGatherBase", functools.partial(_let_gradients_through, patches))


def _let_gradients_through(patches: Patches, kind: Any) -> None:
    """Scatter the gradient of what was gathered, which torch does for NCCL alone."""
    import torch.distributed as dist

    own = kind.backward

    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if state.active() is None:
            return own(ctx, gradient)
        part = gradient.new_empty(gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:])
        _single(dist, "reduce_scatter_single", "reduce_scatter_tensor")(part, gradient.contiguous(), group=ctx.group)
        return None, part, None

    patches.set(kind, "backward", staticmethod(backward))


def _names(*names: str) -> tuple[str, ...]:
    """Return where torch has functions of these names."""
    return tuple(f"{module}.{name}" for name in names for module in ("torch.distributed", _HOME))


def _is_gloo(r: Redirection, group: Any) -> bool:
    import torch.distributed as dist

    return r.hosts is not None and dist.get_backend(group) == "gloo"


def _flat(r: Redirection, group: Any, whole: torch.Tensor, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same memory with one axis where that is all that gloo misses; otherwise both as they are."""
    import torch.distributed as dist

    fits = whole.numel() == part.numel() * dist.get_world_size(group)
    if fits and whole.is_contiguous() and part.is_contiguous() and _is_gloo(r, group):
        return whole.view(-1), part.view(-1)
    return whole, part  # what is wrong is torch's to say


@api(*_names("all_gather_into_tensor", "all_gather_single", "_all_gather_base"))
def all_gather_into_tensor(
    r: Redirection, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Whatever the shapes, as NCCL does."""
    import torch.distributed as dist

    whole, part = _flat(r, group, output_tensor, input_tensor)
    return _single(dist, "all_gather_single", "all_gather_into_tensor")(whole, part, group, async_op)


@api(*_names("reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"))
def reduce_scatter_tensor(
    r: Redirection, output: torch.Tensor, input: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
) -> Any:
    """Whatever the shapes, as NCCL does."""
    import torch.distributed as dist

    factor, op = _factor(r, op, group)
    if factor is not None:
        input = _scaled(input, factor)
    whole, part = _flat(r, group, input, output)
    call = _single(dist, "reduce_scatter_single", "reduce_scatter_tensor")
    return call(part, whole, dist.ReduceOp.SUM if op is None else op, group, async_op)


def _factor(r: Redirection, op: Any, group: Any) -> tuple[Any, Any]:
    """Return by what NCCL multiplies before it adds, and what is left for gloo to do; None and `op` if nothing."""
    import torch.distributed as dist
    from torch.compiler import is_compiling

    premultiplied: Any = dist.ReduceOp.PREMUL_SUM
    if is_compiling() or type(op) is not dist.ReduceOp or op != premultiplied or not _is_gloo(r, group):
        return None, op
    factor = op.__getstate__()[1]  # type: ignore[attr-defined]
    return factor if isinstance(factor, float) else factor.item(), dist.ReduceOp.SUM


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return what a rank adds: another tensor, without a gradient."""
    return tensor.data.clone().mul_(factor)


@api(*_names("all_reduce"))
def all_reduce(r: Redirection, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
    """With a factor for what each rank adds, too."""
    import torch.distributed as dist

    factor, op = _factor(r, op, group)
    if factor is not None:
        tensor.data.mul_(factor)
    return dist.all_reduce(tensor, dist.ReduceOp.SUM if op is None else op, group, async_op)


@api(*_names("reduce"))
def reduce(
    r: Redirection, tensor: torch.Tensor, dst: int | None = None, op: Any = None, group: Any = None,
    async_op: bool = False, group_dst: int | None = None,
) -> Any:  # fmt: skip
    """With a factor for what each rank adds, too."""
    import torch.distributed as dist

    factor, op = _factor(r, op, group)
    if factor is not None:
        receives = dist.get_rank() == dst if group_dst is None else dist.get_rank(group) == group_dst
        tensor = tensor.data.mul_(factor) if receives else _scaled(tensor, factor)  # the others keep what they have
    return dist.reduce(tensor, dst, dist.ReduceOp.SUM if op is None else op, group, async_op, group_dst)


@api(*_names("reduce_scatter"))
def reduce_scatter(
    r: Redirection, output: torch.Tensor, input_list: list[torch.Tensor], op: Any = None, group: Any = None,
    async_op: bool = False,
) -> Any:  # fmt: skip
    """With a factor for what each rank adds, too."""
    import torch.distributed as dist

    factor, op = _factor(r, op, group)
    if factor is not None:
        input_list = [_scaled(part, factor) for part in input_list]
    return dist.reduce_scatter(output, input_list, dist.ReduceOp.SUM if op is None else op, group, async_op)


def _single(dist: Any, name: str, older: str) -> Any:
    """Return torch's function; the older name warns where there is a newer one."""
    return getattr(dist, name, None) or getattr(dist, older)


@api(*_names("all_gather"))
def all_gather(
    r: Redirection, tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Parts of different sizes, too: each is broadcast by its rank, as NCCL's process group does."""
    import torch.distributed as dist

    alike = all(part.shape == tensor_list[0].shape for part in tensor_list)
    if alike or not _is_gloo(r, group):
        return dist.all_gather(tensor_list, tensor, group, async_op)
    own = tensor_list[dist.get_rank(group)]
    if own.shape != tensor.shape:
        raise ValueError(f"this rank gathers a tensor of shape {list(tensor.shape)} into one of {list(own.shape)}")
    own.copy_(tensor)
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    parts = [dist.broadcast(part, ranks[i], group, async_op=True) for i, part in enumerate(tensor_list)]
    work = works.together(parts, tensor_list)
    if async_op:
        return work
    work.wait()
    return None


@api(
    *_names("_coalescing_manager"), verdict="emulated",
    note="calls of other kinds than all_reduce, all_gather_into_tensor and reduce_scatter_tensor run one by one",
)  # fmt: skip
def _coalescing_manager(
    r: Redirection, group: Any = None, device: Any = None, async_ops: bool = False
) -> AbstractContextManager[Any]:
    """Without the device where the library knows no coalescing of its own; torch then makes one call of several."""
    from torch.distributed import distributed_c10d as own

    given = None if _is_gloo(r, group) else r.translate(device)
    manager: AbstractContextManager[Any] = own._coalescing_manager(group, given, async_ops)
    return manager
