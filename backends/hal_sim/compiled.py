# SPDX-License-Identifier: Apache-2.0
"""torch.compile while a simulated device is open: products stay calls, which reach the unit as they do elsewhere.

Inductor makes sums of small products (`mv`, one row, one column) in code of its own, and with "max-autotune" whole
products. Its caches of compiled code do not know who multiplies, and are left alone meanwhile. Code that is C++ alone
calls torch's CPU kernels past the dispatcher: `cpp_wrapper` is not followed, and packages of AOTInductor are counted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from hal.changes import Switch
from hal.torch_kernels import forget_compiled

_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv"})


_PACKAGES = ("AOTIModelPackageLoader", "AOTIModelContainerRunnerCpu")
"""What loads code that AOTInductor made."""


def switches(count: Callable[[str], None]) -> list[tuple[Switch, object]]:
    """Return what opening a device sets, and to what.

    Args:
        count: told of what compiled code computes by itself.
    """
    entry = Switch("products in torch.compile", lambda: _entry.count, _entry.lead_to)
    return [(entry, count), (_packages(), _counted_packages(count))]


class _Entry(MetaPathFinder):
    """Inductor's entry: it is replaced while a device is open, now or whenever its module is executed.

    To import that takes as long as all of torch, and most programs compile nothing.
    """

    count: Callable[[str], None] | None = None
    """Told of what compiled code computes by itself, while a device is open."""

    def __init__(self) -> None:
        self._own: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None
        self._here = threading.local()
        self._compiling = threading.RLock()  # the compiler's tables are those of all threads

    def lead_to(self, count: Callable[[str], None] | None) -> None:
        """Replace the entry, or put torch's own back. What was compiled is compiled anew."""
        self.count = count
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        module = sys.modules.get(_MODULE)
        if module is not None and self._ours is not None and vars(module).get("compile_fx") is self._ours:
            module.compile_fx = self._own  # type: ignore[attr-defined]
        self._own = self._ours = None
        if count is not None:
            sys.meta_path.insert(0, self)
            if module is not None:
                self._replace(importlib.import_module(_MODULE))  # waits for a thread that is just importing it
        forget_compiled()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Let others find the module, and replace its entry once it is executed."""
        if fullname != _MODULE:
            return None
        found = PathFinder.find_spec(fullname, path, target)  # type: ignore[arg-type]
        if found is None or found.loader is None:
            return found
        execute = found.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self.count is not None:
                self._replace(module)

        found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found

    def _replace(self, module: ModuleType) -> None:
        own = vars(module).get("compile_fx")
        if own is None or own is self._ours:
            return

        @functools.wraps(own)
        def compile_with_products(*args: Any, **kwargs: Any) -> Any:
            from torch._inductor.virtualized import V

            count = self.count
            # It calls itself. What is compiled ahead of time is C++ alone, and counted when it is loaded.
            if count is None or V.aot_compilation or getattr(self._here, "compiling", False):
                return own(*args, **kwargs)
            given = inspect.signature(own).bind(*args, **kwargs).arguments
            given["config_patches"] = {**(given.get("config_patches") or {}), "cpp_wrapper": False}
            with self._compiling:
                self._here.compiling = True
                try:
                    with _left_as_calls(count):
                        return own(**given)
                finally:
                    self._here.compiling = False

        self._own, self._ours = own, compile_with_products
        module.compile_fx = compile_with_products  # type: ignore[attr-defined]


_MODULE = "torch._inductor.compile_fx"
_entry = _Entry()


def _packages() -> Switch:
    """Return the switch between the classes that load packages and others."""
    import torch

    def write(new: tuple[type, ...]) -> None:
        for name, found in zip(_PACKAGES, new, strict=True):
            setattr(torch._C._aoti, name, found)

    return Switch("packages of AOTInductor", lambda: tuple(getattr(torch._C._aoti, name) for name in _PACKAGES), write)


def _counted_packages(count: Callable[[str], None]) -> tuple[type, ...]:
    import torch

    def counted(own: Any) -> type:
        def load(self: Any, *args: Any, **kwargs: Any) -> None:
            count("a package of AOTInductor")
            own.__init__(self, *args, **kwargs)

        return type(own.__name__, (own,), {"__init__": load})

    return tuple(counted(getattr(torch._C._aoti, name)) for name in _PACKAGES)


@contextlib.contextmanager
def _left_as_calls(count: Callable[[str], None]) -> Iterator[None]:
    import torch
    import torch._functorch.config as functorch
    from torch._inductor import config, decomposition, lowering

    decompositions: dict[Any, Any] = decomposition.decompositions
    removed = {operator: decompositions.pop(operator) for operator in list(decompositions) if _is_product(operator)}
    lowerings: dict[Any, Any] = lowering.lowerings
    # The decomposed ones too: what has no lowering Inductor makes a call by itself, but refuses to where torch knows
    # a decomposition and the variable CI is set.
    products = {operator for operator in {*lowerings, *removed} if _is_product(operator)}
    changed = {operator: lowering.fallback_handler(operator, add_to_fallback_set=False)
               for operator in products if isinstance(operator, torch._ops.OpOverload)}  # fmt: skip
    changed |= {operator: _counted(operator, own, count)
                for operator, own in lowerings.items() if "flex_attention" in str(operator)}  # fmt: skip
    own_lowerings = {operator: lowerings[operator] for operator in changed if operator in lowerings}
    lowerings.update(changed)
    decomposition.fast_random_decomps.cache_clear()
    try:
        # The backward pass is compiled at once, while this is in force.
        with (config.patch(force_disable_caches=True, max_autotune_gemm_backends="ATEN"),
              functorch.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)):  # fmt: skip
            yield
    finally:
        decompositions.update(removed)
        for operator in changed:
            del lowerings[operator]
        lowerings.update(own_lowerings)
        decomposition.fast_random_decomps.cache_clear()


def _is_product(operator: Any) -> bool:
    namespace, _, name = str(operator).partition(".")
    return namespace == "aten" and name.partition(".")[0] in _PRODUCTS


def _counted(operator: Any, own: Callable[..., Any], count: Callable[[str], None]) -> Callable[..., Any]:
    def lower(*args: Any, **kwargs: Any) -> Any:
        count(f"{operator} in compiled code")
        return own(*args, **kwargs)

    return lower
