# SPDX-License-Identifier: Apache-2.0
"""Simulated accelerators: matrix units bit by bit where their arithmetic is known; all else as the CPU computes it."""

from hal_sim.backend import backend

__all__ = ["backend"]
