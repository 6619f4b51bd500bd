# SPDX-License-Identifier: Apache-2.0
"""Honest twins of a training run: the same model, computed in another order, from parameters that differ in one ulp.

Permuting the channels, the hidden units, and the experts is a symmetry of the equations, and changes the order of every
sum and of every tie. In 16 bits that is little, since most sums are rounded to the same number: what sets honest
devices apart there is where they round, so that each twin draws, operator by operator, one of the honest
implementations by which the suite is tested. What sets a twin's loss apart from another's is therefore what sets an
honest device's apart: order, ties, store points, and what the model makes of them in time.

Legend: D model dim, E experts, F their hidden dim, S of the shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import I64, Arrays
from hal_conformance.language.spec import LanguageSpec


def twin(start: Arrays, spec: LanguageSpec, number: int) -> Arrays:
    """Return the parameters of one twin: permuted along D, E, F and S, each moved by at most an ulp."""
    found: Arrays = {}
    orders: dict[str, I64] = {}
    for name, array in start.items():
        block, _, kind = name.rpartition("/")
        letters = kind.rsplit("_", 1)[-1]
        changed = array * (1.0 + make.integers(number, f"twin/{name}", -1, 1, *array.shape) * 2.0**-23)
        for axis, letter in enumerate(letters):
            if letter not in "DEFS":
                continue
            # The channels run through the whole model; experts and their units are a block's own.
            where = letter if letter == "D" else f"{block}/{letter}"
            if where not in orders:
                orders[where] = make.permutation(number, f"twin/order/{where}", array.shape[axis])
            changed = np.take(changed, orders[where], axis)
        found[name] = changed.astype(np.float32)
    return found


CHOICES: Mapping[str, tuple[str, ...]] = {
    "layer": (
        "built_from_parts", "reversed", "split_k", "blocked", "wide", "fused_expert", "wide_fused", "one_store",
        "wide_combine", "adds_by_index", "powers_of_two", "folded_scale", "softmax_of_chosen", "wide_losses",
    ),
    "attention": (
        "composed_attention", "stores_probabilities", "wide_attention", "blocked_attention", "turned_attention",
        "attention_in_two_parts", "attention_by_logarithms", "attention_key_by_key",
    ),
    "rms_norm": ("wide_norms", "blocked_norms", "fused_norms"),
    "rotary": ("wide_rotary", "fused_rotary", "complex_rotary"),
    "norm_head": ("wide_head", "norm_in_blocks", "divides_tokens"),
    "cross_entropy": ("wide_head", "chunked_vocabulary", "chunked_tokens", "fused_loss"),
    "clip_grad_norm": ("clips_lists", "wide_clipping", "clips_in_sequence", "clips_by_pairs"),
    "adamw_step": ("fused_optimizer", "written_adam", "wide_adam", "adam_of_apex", "adam_of_mixed_constants"),
}  # fmt: skip
"""Honest implementations of each operator (`hal_conformance.faults`), besides the portable one: those that round at
other places, and those that add up in another order."""


def operators(number: int) -> Any:
    """Return the implementation of one twin: each operator the portable one, or one of the others, by lot."""
    from hal_conformance.faults import VARIATIONS
    from hal_conformance.portable import portable

    drawn: dict[str, Any] = {}
    for operator, names in CHOICES.items():
        place = int(make.integers(number, f"twin/{operator}", 0, len(names), 1)[0])
        ops = portable if place == len(names) else VARIATIONS[names[place]].make()
        drawn |= {name: getattr(ops, name) for name in (operator, *(("experts",) if operator == "layer" else ()))}
    return SimpleNamespace(**drawn)
