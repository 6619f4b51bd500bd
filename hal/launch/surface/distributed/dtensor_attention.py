# SPDX-License-Identifier: Apache-2.0
"""Attention on distributed tensors: torch knows how CUDA's kernels are sharded, and not how a CPU's own is.

It is sharded as they are: by sequences of the batch, or by heads.
"""

from __future__ import annotations

import functools
from typing import Any

from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_MODULE = "torch.distributed.tensor"


def install(redirection: Redirection, patches: Patches) -> None:
    """Tell distributed tensors, once somebody loads them."""
    if redirection.hosts is not None:
        when_loaded(_MODULE, "DTensor", lambda kind: _register(patches, kind))


def _register(patches: Patches, kind: Any) -> None:
    import torch
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    known = kind._op_dispatcher.sharding_propagator
    aten: Any = torch.ops.aten
    for name, outputs, tensors in (
        ("_scaled_dot_product_flash_attention_for_cpu", 2, 3),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", 3, 6),
    ):
        operator = getattr(getattr(aten, name, None), "default", None)
        if operator is None or operator in known.op_strategy_funcs:
            continue
        # What was found is kept by what it was found for, of which a mask is a part.
        info = RuntimeSchemaInfo(100, ["attn_mask"], needs_pytree=True)
        known.register_op_strategy(operator, functools.partial(_strategy, outputs, tensors), info)
        patches.on_undo(functools.partial(_forget, known, operator))


def _strategy(outputs: int, tensors: int, schema: Any) -> Any:
    """Return how an operator with so many results and tensors may be sharded.

    Raises:
        RuntimeError: a mask lies so that nothing goes with it; torch moves no argument that is given by name.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    given = schema.kwargs_schema.get("attn_mask")
    mask = None if given is None else given.strategies[0].output_spec
    places: tuple[Any, ...] = (Replicate(), Shard(0), Shard(1))
    lists: list[Any] = []
    for place in places:
        whole = [place] * (outputs + tensors)
        if mask is not None:  # [T, S], or with batch and heads, each of which may be 1 for all
            shape = mask.shape
            alike = place == Replicate() or len(shape) < 4 or shape[place.dim] == 1
            whole.append(Replicate() if alike else place)
        lists.append(whole)
    found = expand_to_full_mesh_op_strategy(schema.get_mesh_from_args(), schema, lists, input_index=outputs)
    if mask is not None:
        every: Any = found.strategies
        found.strategies = [each for each in every if each.input_specs[-1].placements == mask.placements]
        if not found.strategies:
            raise RuntimeError(
                f"attention on distributed tensors: a mask of shape {list(mask.shape)} is placed as {mask.placements}, "
                "which goes with no placement of its operands; replicate it, or place it as they are"
            )
    return found


def _forget(known: Any, operator: Any) -> None:
    for table in ("op_strategy_funcs", "op_to_schema_info"):
        getattr(known, table, {}).pop(operator, None)
    known.propagate_op_sharding.cache_clear()
