# SPDX-License-Identifier: Apache-2.0
"""Which of CUDA's libraries for linear algebra and products a program prefers, which other builds of torch refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal.launch.api import api
from hal.launch.redirection import Redirection

_NOTE = "kept and given back; the device has one library"
# Function, the dictionary of names beside it in torch, and the class of what it returns.
_CHOICES = (
    ("preferred_linalg_library", "_LinalgBackends", "_LinalgBackend"),
    ("preferred_blas_library", "_BlasBackends", "_BlasBackend"),
)


def _enter(name: str, names: str, kind: str) -> Callable[..., Any]:
    @api(f"torch.backends.cuda.{name}", verdict="emulated", note=_NOTE)
    def preferred(r: Redirection, backend: Any = None) -> Any:
        """Keep a preference, if one is given, and return the one in force.

        Raises:
            RuntimeError: there is no such library; torch raises this, too.
        """
        import torch

        known, member = vars(torch.backends.cuda)[names], getattr(torch._C, kind)
        if isinstance(backend, str) and backend not in known:
            raise RuntimeError(f"Unknown input value. Choose from: {', '.join(known)}.")
        if not (backend is None or isinstance(backend, (str, member))):
            raise RuntimeError("Unknown input value type.")
        if backend is not None:
            r.kept[name] = known[backend] if isinstance(backend, str) else backend
        return r.kept.get(name, member.Default)

    return preferred


for _names in _CHOICES:
    _enter(*_names)
