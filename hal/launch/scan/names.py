# SPDX-License-Identifier: Apache-2.0
"""Names in one source file, and what of torch they stand for."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass
class _Scope:
    """What names stand for in a module, a class or a function; None: for something that is not torch's.

    Attributes:
        known: by name.
        attributes: of `self`, in a class.
        is_class: whose names its functions do not see.
        stars: modules of which all names are imported.
    """

    known: dict[str, str | None] = field(default_factory=dict)
    attributes: dict[str, str | None] = field(default_factory=dict)
    is_class: bool = False
    stars: list[str] = field(default_factory=list)


class Names:
    """What the names of a file stand for, as far as its imports and plain assignments tell, each in its own scope.

    Order within a scope does not count: what is imported stands before what is assigned, and what is assigned last
    before what was assigned first.

    Args:
        tree: of the file.
        exported: names of torch's, with dots, of which the first parts may come by `from torch import *`.
    """

    def __init__(self, tree: ast.AST, exported: Collection[str] = ()) -> None:
        self._exported = {name.split(".")[1] for name in exported if name.startswith("torch.")}
        self._scopes: list[_Scope] = []
        self._scopes.append(_Scope())
        self._fill(tree)

    @contextlib.contextmanager
    def inside(self, node: ast.AST) -> Iterator[None]:
        """Read names as a function, a class or a comprehension does that is entered here."""
        self._scopes.append(_Scope(is_class=isinstance(node, ast.ClassDef)))
        self._fill(node)
        try:
            yield
        finally:
            self._scopes.pop()

    def _fill(self, top: ast.AST) -> None:
        """Read what the innermost scope binds."""
        scope = self._scopes[-1]
        if isinstance(top, _Function):
            given = top.args
            parameters = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
            names = {parameter.arg for parameter in parameters if parameter is not None}
            scope.known |= dict.fromkeys(names - {"torch"})
        here = list(_of_scope(top))
        elsewhere = {name for node in here if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}
        stores = {node.id for node in here if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        # `torch = pytest.importorskip("torch")` is torch, as far as anything around it says so.
        scope.known |= dict.fromkeys(stores - elsewhere - {"torch"})
        imported = set()
        for node in here:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    scope.known[alias.asname or first] = alias.name if alias.asname else first
                    imported.add(alias.asname or first)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if alias.name == "*":
                        scope.stars.append(node.module)
                    else:
                        scope.known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                        imported.add(alias.asname or alias.name)
        for target, value in _assignments(here):
            if isinstance(target, ast.Name) and target.id not in imported:
                full = self._torchs(value)
                if full is not None:
                    (self._scopes[0] if target.id in elsewhere else scope).known[target.id] = full
        if scope.is_class:
            scope.attributes |= scope.known
            # `self.c = torch.cuda` in a method; what it stands for there is what it stands for here, mostly.
            for method in ast.iter_child_nodes(top):
                if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    with self.inside(method):
                        found = [(target, self._torchs(value)) for target, value in _assignments(_of_scope(method))]
                    for target, full in found:
                        if full is not None and isinstance(target, ast.Attribute) and _of_self(target):
                            scope.attributes[target.attr] = full

    def _torchs(self, value: ast.AST) -> str | None:
        full = self.of(value)
        return full if full is not None and (full == "torch" or full.startswith("torch.")) else None

    def of(self, node: ast.AST) -> str | None:
        """Return the dotted name that an expression stands for, such as `torch.cuda.synchronize`, or None."""
        if isinstance(node, ast.Name):
            return self._look_up(node.id)
        if isinstance(node, ast.NamedExpr):
            return self.of(node.value)
        if isinstance(node, ast.IfExp):  # `wait = torch.cuda.synchronize if on_cuda else nothing`
            return self.of(node.body) or self.of(node.orelse)
        if isinstance(node, ast.Attribute):
            if _of_self(node):
                classes = (scope for scope in reversed(self._scopes) if scope.is_class)
                return next((scope.attributes.get(node.attr) for scope in classes), None)
            inner = self.of(node.value)
            return None if inner is None else f"{inner}.{node.attr}"
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(attribute)), *_]):
                inner = self.of(owner)
                return None if inner is None else f"{inner}.{attribute}"
            case ast.Call(func=importer, args=[ast.Constant(value=str(module))]):
                return module if self.of(importer) == "importlib.import_module" else None
        return None

    def _look_up(self, name: str) -> str | None:
        for scope in reversed(self._scopes):
            if name in scope.known and not (scope.is_class and scope is not self._scopes[-1]):
                return scope.known[name]
        for scope in reversed(self._scopes):
            for module in scope.stars:
                if module.startswith("torch.") or (module == "torch" and name in self._exported):
                    return f"{module}.{name}"
                if name == "torch":  # `from helpers import *`, whose file imports it, as far as anything here says so
                    return name
        return None


def _of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _of_scope(top: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below one that belong to its own scope, in the order of the text."""
    waiting: list[ast.AST]
    if isinstance(top, _Comprehension):
        waiting = [*top.generators]
    elif isinstance(top, ast.Lambda):
        waiting = [top.body]
    elif isinstance(top, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        waiting = [*top.body]
    else:
        waiting = list(ast.iter_child_nodes(top))
    waiting.reverse()
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_SCOPES, ast.Constant)):
            waiting.extend(list(ast.iter_child_nodes(node))[::-1])


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp,
           ast.GeneratorExp)  # fmt: skip


def _assignments(nodes: Collection[ast.AST] | Iterator[ast.AST]) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield each target that is given a value by itself: `x = y = v`, `x, y = v, w`, `x: T = v` and `(x := v)`."""
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, (ast.Tuple, ast.List)):
                    if isinstance(node.value, (ast.Tuple, ast.List)) and len(node.value.elts) == len(target.elts):
                        yield from zip(target.elts, node.value.elts, strict=True)
                else:
                    yield target, node.value
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            yield node.target, node.value
