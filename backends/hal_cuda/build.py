# SPDX-License-Identifier: Apache-2.0
"""What the installed torch was built for, found out without importing it.

Listing must not import torch: allocator settings act only before the first import. The build is written down in
`torch/version.py`, a generated file of literals.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from hal.errors import Broken


@dataclass(frozen=True)
class TorchBuild:
    """Version of torch, and the toolkits that it was built with; None for each that it was not."""

    version: str
    cuda: str | None
    hip: str | None

    def at_least(self, major: int, minor: int) -> bool:
        """Return whether torch is of this version or a later one."""
        parts = self.version.split("+")[0].split(".")
        return (int(parts[0]), int(parts[1])) >= (major, minor)

    def __str__(self) -> str:
        kind = f"CUDA {self.cuda}" if self.cuda else f"HIP {self.hip}" if self.hip else "no GPU"
        return f"torch {self.version}, built for {kind}"


def torch_build() -> TorchBuild | None:
    """Return the build of the torch that is imported or would be, None if there is none.

    Raises:
        Broken: there is one, and it does not say what it was built for: it is damaged, or something else of this name.
    """
    imported = sys.modules.get("torch.version")
    if imported is not None:
        return TorchBuild(str(imported.__version__), getattr(imported, "cuda", None), getattr(imported, "hip", None))
    spec = importlib.util.find_spec("torch")
    if spec is None:
        return None
    # A folder without an `__init__.py` has no origin: what an uninstall left behind, say.
    folder = Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations or ["torch"])))
    where = folder / "version.py"
    try:
        literals = _literals(where.read_text(encoding="utf-8"))
        return TorchBuild(literals["__version__"], literals.get("cuda"), literals.get("hip"))
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise Broken(
            f"{where} does not tell its build ({type(error).__name__}: {error})", device="torch",
            hint="reinstall torch; `hal doctor` shows whether it can be imported",
        ) from error  # fmt: skip


def _literals(source: str) -> dict[str, str]:
    """Return the names in a module that are set to strings."""
    found = {}
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[target.id] = value.value
    return found
