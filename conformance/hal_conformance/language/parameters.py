# SPDX-License-Identifier: Apache-2.0
"""The model's parameters: names, shapes, and where they start.

Legend: V vocabulary, D model dim, H query heads, G key heads, d width of a head, P = (H + 2 G) d, Q = H d, E experts, F
hidden dim of an expert, S of the shared experts. The dense MLP is one expert, E = 1.
"""

from __future__ import annotations

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import Arrays
from hal_conformance.language.spec import LanguageSpec
from hal_conformance.language.text import VOCABULARY

EMBEDDING, NORM, HEAD = "embedding_VD", "norm_D", "head_VD"
ATTENTION_NORM, MLP_NORM = "attention_norm_D", "mlp_norm_D"
PROJECTION, OUTPUT = "wqkv_PD", "wo_DQ"
GATE = "gate_ED"
ROUTED = ("w1_EFD", "w3_EFD", "w2_EDF")
SHARED = ("shared_w1_SD", "shared_w3_SD", "shared_w2_DS")


def of(layer: int, name: str) -> str:
    """Return the name of a block's parameter."""
    return f"{layer}/{name}"


def shapes(spec: LanguageSpec) -> dict[str, tuple[int, ...]]:
    """Return every parameter's shape, in a fixed order."""
    d = spec.width
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCABULARY, d)}
    for layer in range(spec.layers):
        block: dict[str, tuple[int, ...]] = {
            ATTENTION_NORM: (d,),
            PROJECTION: (spec.projected, d),
            OUTPUT: (d, spec.heads * spec.head_width),
            MLP_NORM: (d,),
        }
        model = spec.experts
        e, f = (1, spec.dense) if model is None else (model.router.num_experts, model.expert_hidden_size)
        if model is not None:
            block[GATE] = (e, d)
        block |= dict(zip(ROUTED, ((e, f, d), (e, f, d), (e, d, f)), strict=True))
        if model is not None and model.shared_hidden_size:
            s = model.shared_hidden_size
            block |= dict(zip(SHARED, ((s, d), (s, d), (d, s)), strict=True))
        found |= {of(layer, name): shape for name, shape in block.items()}
    return found | {NORM: (d,), HEAD: (VOCABULARY, d)}


def initial(spec: LanguageSpec, seed: int) -> Arrays:
    """Return the parameters before training, float32: norms 1, matrices of deviation 1 / sqrt(columns).

    What a block adds to its input starts smaller by sqrt(2 * layers), as in GPT-2, so that depth does not matter.
    """
    found: Arrays = {}
    for name, shape in shapes(spec).items():
        kind = name.rsplit("/", 1)[-1]
        if kind in (ATTENTION_NORM, MLP_NORM, NORM):
            values = np.ones(shape)
        else:
            values = make.normal(seed, f"language/{spec.name}/{name}", *shape) / np.sqrt(shape[-1])
            if kind in (OUTPUT, ROUTED[2], SHARED[2]):
                values /= np.sqrt(2.0 * spec.layers)
        found[name] = values.astype(np.float32)
    return found
