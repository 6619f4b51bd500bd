# SPDX-License-Identifier: Apache-2.0
"""Alibaba's T-Head PPU, which has no torch device type of its own and answers to `torch.cuda`.

State: written from what users report (sglang#37519, AReno#442, sglang-plugin-FL#64), and tested against a stand-in
with those properties. No such hardware has run this yet.
"""

from hal_ppu.backend import backend

__all__ = ["backend"]
