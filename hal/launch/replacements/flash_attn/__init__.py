# SPDX-License-Identifier: Apache-2.0
"""flash-attn's functions by torch's attention (https://github.com/Dao-AILab/flash-attention, 2.8).

Shapes as there: [batch, length, heads, channels], of packed sequences [all positions, heads, channels] with the
cumulated lengths. A causal mask is aligned to the bottom right, and a query that sees no key has the result 0.
"""

from __future__ import annotations

from hal.launch.replacements.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"
__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
