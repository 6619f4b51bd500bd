# SPDX-License-Identifier: Apache-2.0
"""apex's fused optimisers and norms by torch's own (https://github.com/NVIDIA/apex, 2025)."""

from __future__ import annotations

from hal.launch.replacements.apex import normalization, optimizers

__all__ = ["normalization", "optimizers"]
