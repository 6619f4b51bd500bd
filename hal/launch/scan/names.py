# SPDX-License-Identifier: Apache-2.0
"""Names in one source file, and what of torch they stand for."""

from __future__ import annotations

import ast


class Names:
    """What the names of a file stand for, as far as its imports and plain assignments tell.

    One table for the whole file: a name that two functions import differently stands for what was imported last.

    Args:
        tree: of the file.
    """

    def __init__(self, tree: ast.AST) -> None:
        self._known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    self._known[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self._known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):  # `cuda = torch.cuda`
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if isinstance(node.value, ast.Attribute) and name not in self._known:
                    full = self.of(node.value)
                    if full is not None and full.startswith("torch."):
                        self._known[name] = full

    def of(self, node: ast.AST) -> str | None:
        """Return the dotted name that an expression stands for, such as `torch.cuda.synchronize`, or None."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = self.of(node.value)
            return None if inner is None else f"{inner}.{node.attr}"
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(attribute)), *_]):
                inner = self.of(owner)
                return None if inner is None else f"{inner}.{attribute}"
            case ast.Call(func=importer, args=[ast.Constant(value=str(module))]):
                return module if self.of(importer) == "importlib.import_module" else None
        return None
