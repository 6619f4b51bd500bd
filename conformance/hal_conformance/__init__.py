# SPDX-License-Identifier: Apache-2.0
"""The cross-device conformance suite: do the MoE numerics of two devices agree, and if not, where and why?"""

from __future__ import annotations

from hal_conformance.verdicts import Judgement, Status, worst

__all__ = ["Judgement", "Status", "worst"]
