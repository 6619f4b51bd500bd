# SPDX-License-Identifier: Apache-2.0
"""Which routers a block can express, as data, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hal.moe.router_spec import RouterSpec

Abilities = Mapping[str, tuple[Any, ...]]
"""Fields of `RouterSpec` to the values that a block has; a field that is not named may have any."""


def unlike(spec: RouterSpec, able: Abilities, dtype: torch.dtype) -> str:
    """Return why a block cannot express a router, or nothing.

    Args:
        spec: the router.
        able: what the block can.
        dtype: of the activations; in float32 the dtype of the model and float32 are the same.
    """
    for name, values in able.items():
        value = getattr(spec, name)
        if name in ("gate_dtype", "weight_dtype") and dtype == torch.float32:
            continue
        if name in ("group_score", "masked_score") and spec.num_groups == spec.top_groups:
            continue
        if value not in values:
            has = " or ".join(repr(v) for v in values)
            return f"the block's router has {name} {has}, the preset's {value!r}"
    return ""
