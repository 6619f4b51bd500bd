# SPDX-License-Identifier: Apache-2.0
"""The CPU as a first-class device."""

from hal_cpu.backend import backend

__all__ = ["backend"]
