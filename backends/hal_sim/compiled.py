# SPDX-License-Identifier: Apache-2.0
"""torch.compile while a simulated device is open: products stay calls, which reach the unit as they do elsewhere.

Inductor makes sums of small products (`mv`, one row, one column) in code of its own, and with "max-autotune" whole
products. Its caches of compiled code do not know who multiplies, and are left alone meanwhile. Code that is C++ alone
calls torch's CPU kernels past the dispatcher: `cpp_wrapper` is not followed, and packages of AOTInductor are counted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hal.changes import Switch

_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv"})


_PACKAGES = ("AOTIModelPackageLoader", "AOTIModelContainerRunnerCpu")
"""What loads code that AOTInductor made."""


def switches(count: Callable[[str], None]) -> list[tuple[Switch, object]]:
    """Return what opening a device sets, and to what.

    Args:
        count: told of what compiled code computes by itself.
    """
    return [(_entry(), _with_products(count)), (_packages(), _counted_packages(count))]


def _entry() -> Switch:
    """Return the switch between Inductor's entry in torch and one around it. What was compiled is compiled anew."""
    import torch

    entry: Any = torch._TorchCompileInductorWrapper

    def write(new: Any) -> None:
        entry.__call__ = new
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].reset()

    return Switch("products in torch.compile", lambda: entry.__call__, write)


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


def _with_products(count: Callable[[str], None]) -> Callable[..., Any]:
    """Return the entry around Inductor's own."""
    import torch

    entry: Any = torch._TorchCompileInductorWrapper
    original = entry.__call__

    @functools.wraps(original)
    def compile_with_products(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.config
        self.config = asked | {"cpp_wrapper": False}
        try:
            with _left_as_calls(count):
                return original(self, *args, **kwargs)
        finally:
            self.config = asked

    return compile_with_products


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
