# SPDX-License-Identifier: Apache-2.0
"""AMD GPUs, through the build of torch for ROCm, which calls them `torch.cuda`.

State: written from the sources of torch and the vendor's documentation, and tested against a stand-in with
published properties. No such hardware has run this yet.
"""

from hal_rocm.backend import backend

__all__ = ["backend"]
