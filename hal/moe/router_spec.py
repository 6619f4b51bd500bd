# SPDX-License-Identifier: Apache-2.0
"""How a router turns a token's logits into K experts and K weights, as data.

Legend: E routed experts, K choices per token.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

from hal.errors import ConfigError

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class RouterSpec:
    """The equations of one router; every published router of `hal.moe.PRESETS` is an instance.

    In order: logits = x gate^T; scores = softmax or sigmoid of the logits; selection scores = scores, plus a
    bias; only the best groups of experts stay; the K best experts are chosen, ties to the lower index;
    weights = the scores (never the selection scores) of the chosen, divided by their sum, times a factor.

    Attributes:
        num_experts: E.
        top_k: K, 1 <= K <= E.
        score: "softmax" over all E experts, or "sigmoid" of each.
        normalize: divide the K chosen scores by (their sum + `normalize_epsilon`).
        normalize_epsilon: added to that sum; 0.0 adds nothing.
        num_groups: experts are cut into this many equal groups of consecutive indices.
        top_groups: how many groups stay in the selection.
        group_score: a group's "max" selection score, or the sum of its two largest.
        masked_score: what an expert outside the chosen groups scores in the selection: -inf, or 0.0 as in
            Hugging Face's DeepSeek-V2.
        selection_bias: a bias per expert is added for the choice, and never reaches the weights.
        scaling_factor: the weights are multiplied by it, last.
        gate_dtype: arithmetic and storage of the logits: "float32", or the dtype of the activations
            ("model"). Scores are always computed in float32 from them.
        weight_dtype: the dtype in which the weights are returned.

    Raises:
        ConfigError: an attribute is of the wrong type or out of range, or two contradict each other.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    normalize_epsilon: float = 0.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    masked_score: float = -math.inf
    selection_bias: bool = False
    scaling_factor: float = 1.0
    gate_dtype: Literal["float32", "model"] = "float32"
    weight_dtype: Literal["float32", "model"] = "float32"

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "num_groups", "top_groups"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"RouterSpec: {name} is {value!r}", expected="an integer of at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"RouterSpec: cannot choose top_k = {self.top_k} of num_experts = {self.num_experts}",
                expected="top_k <= num_experts",
            )
        for name, allowed in (
            ("score", ("softmax", "sigmoid")),
            ("group_score", ("max", "top2_sum")),
            ("gate_dtype", ("float32", "model")),
            ("weight_dtype", ("float32", "model")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ConfigError(f"RouterSpec: {name} is {value!r}", expected=" or ".join(allowed))
        for name in ("normalize", "selection_bias"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ConfigError(f"RouterSpec: {name} is {value!r}", expected="True or False")
        for name, least, expected in (
            ("normalize_epsilon", 0.0, "a finite number >= 0"),
            ("scaling_factor", -_LARGEST, "a finite number"),
            ("masked_score", -math.inf, "a finite number or -inf"),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and least <= value <= _LARGEST):
                raise ConfigError(f"RouterSpec: {name} is {value!r}", expected=expected)
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"RouterSpec: {self.num_experts} experts cannot be cut into {self.num_groups} equal groups",
                expected="num_groups divides num_experts",
            )
        if self.top_groups > self.num_groups:
            raise ConfigError(
                f"RouterSpec: cannot keep top_groups = {self.top_groups} of num_groups = {self.num_groups}",
                expected="top_groups <= num_groups",
            )
        if self.top_groups * self.group_size < self.top_k:
            raise ConfigError(
                f"RouterSpec: {self.top_groups} groups of {self.group_size} experts hold fewer than "
                f"top_k = {self.top_k}",
                expected="top_groups * num_experts / num_groups >= top_k",
            )
        if self.group_score == "top2_sum" and self.group_size < 2:
            raise ConfigError(
                f"RouterSpec: group_score 'top2_sum' needs groups of two or more, not {self.group_size}",
                expected="num_experts / num_groups >= 2",
            )

    @property
    def group_size(self) -> int:
        """Experts in each group."""
        return self.num_experts // self.num_groups
