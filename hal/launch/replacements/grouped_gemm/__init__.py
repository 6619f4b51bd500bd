# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm's product by torch's (https://github.com/tgale96/grouped_gemm, 0.3)."""

from __future__ import annotations

from hal.launch.replacements.grouped_gemm import ops

__version__ = "0.3.0"
__all__ = ["ops"]
