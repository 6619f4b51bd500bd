# SPDX-License-Identifier: Apache-2.0
"""Programs that were written for CUDA, on another device: `hal run`, `hal scan` and `hal.adopt`."""
