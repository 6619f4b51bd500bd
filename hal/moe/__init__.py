# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts operators: their interface, the published routers, and (in `hal.moe.torch_ops`) a
portable implementation.

Importing this package imports no torch, so a host that only compares recordings can read the presets.
"""

from __future__ import annotations

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import (
    Dispatch,
    ExpertWeights,
    LayerOutput,
    LayerWeights,
    MoEOps,
    Routing,
    SharedWeights,
)
from hal.moe.presets import PRESETS, preset
from hal.moe.router_spec import RouterSpec

__all__ = [
    "PRESETS",
    "Dispatch",
    "ExpertWeights",
    "LayerOutput",
    "LayerWeights",
    "MoEModelSpec",
    "MoEOps",
    "RouterSpec",
    "Routing",
    "SharedWeights",
    "preset",
]
