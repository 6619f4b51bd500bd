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
    from torch.distributed.tensor.experimental import register_sharding

    known = kind._op_dispatcher.sharding_propagator
    aten: Any = torch.ops.aten
    for name, outputs, tensors, others in (
        ("_scaled_dot_product_flash_attention_for_cpu", 2, 3, 2),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", 3, 6, 2),
    ):
        operator = getattr(getattr(aten, name, None), "default", None)
        if operator is None or operator in known.op_strategy_funcs:
            continue
        register_sharding(operator)(_shardings(outputs, tensors, others))
        # What was found is kept by what it was found for, of which a mask is a part.
        known.op_to_schema_info[operator] = RuntimeSchemaInfo(100, ["attn_mask"], needs_pytree=True)
        patches.on_undo(functools.partial(_forget, known, operator))


def _shardings(outputs: int, tensors: int, others: int) -> Any:
    """Return what torch asks for the placements of an operator with so many results and arguments."""

    def shardings(*args: Any, attn_mask: Any = None, **kwargs: Any) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        found = []
        places: tuple[Any, ...] = (Replicate(), Shard(0), Shard(1))
        for place in places:
            inputs: list[Any] = [place] * tensors + [None] * others
            if attn_mask is not None:
                # [T, S], or with batch and heads, each of which may be 1 for all. torch moves no argument by name: a
                # mask stays where it is, and what would need another one is left out.
                shape = attn_mask.shape
                whole = place == Replicate() or len(shape) < 4 or shape[place.dim] == 1
                mask = Replicate() if whole else place
                if any(placed != mask for placed in attn_mask.placements):
                    continue
                inputs.append(mask)
            found.append(([place] * outputs, inputs))
        return found

    return shardings


def _forget(known: Any, operator: Any) -> None:
    for table in ("op_strategy_funcs", "op_to_schema_info"):
        getattr(known, table, {}).pop(operator, None)
    known.propagate_op_sharding.cache_clear()
