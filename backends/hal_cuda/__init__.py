# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs, through `torch.cuda`.

Other vendors' chips answer to `torch.cuda`, too: this backend claims only what is NVIDIA's.

State: written from the sources of torch and the vendor's documentation, and tested against a stand-in with
published properties. No such hardware has run this yet.
"""

from hal_cuda.backend import backend

__all__ = ["backend"]
