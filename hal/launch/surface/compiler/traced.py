# SPDX-License-Identifier: Apache-2.0
"""What compiled code did: counted, noted and refused while it is traced, under the line that is traced.

Compiled code runs none of our functions. The compiler traces through them once, and again where it compiles anew: so
often a call is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal.launch import api as state
from hal.launch.awaited import when_loaded
from hal.launch.caller import is_insider
from hal.launch.named import name_of
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.surface.tensors.factories import makers

_ON_HOST = "hal_on_host"
"""Among what a graph's node knows of itself: the tensor is on the host."""


def install(redirection: Redirection, patches: Patches) -> None:
    """Follow the compiler, once somebody loads it."""
    when_loaded("torch._dynamo.symbolic_convert", "InliningInstructionTranslator",
                lambda kind: _follow(redirection, patches, kind))  # fmt: skip
    if redirection.hosts is not None:
        when_loaded("torch._dynamo.variables.builder", "VariableBuilder",
                    lambda kind: _mark_hosts(redirection, patches, kind))  # fmt: skip


def note(kind: str, api: str, what: str) -> bool:
    """Note a change of meaning or a fallback in code that is traced.

    The compiler calls this while it traces, with constants, and takes what it returns for a constant.

    Raises:
        torch._dynamo.exc.Unsupported: in strict mode: the code is not compiled but run, and refused then.
    """
    redirection = state._active
    if redirection is not None and redirection.strict:
        raise _not_compiled(f"{api} would change its meaning: {what}; the strict mode refuses it")
    if redirection is not None:
        if kind == "fallback":
            redirection.fallback(api, what, 0)
        else:
            redirection.change(api, what)
    return True


note._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result does


def _not_compiled(why: str) -> Exception:
    """Return the exception by which the compiler leaves code to be run; told to compile all of it, it shows it."""
    from torch._dynamo.exc import Unsupported

    return Unsupported(why)


def asked(redirection: Redirection, tx: Any, variable: Any, api: str) -> None:
    """Count that traced code asked a tensor where it is.

    Of a tensor that the program gave to compiled code, or that it made there, it is known whether it is on the host.
    Code that asks such a one is not compiled but run; or, where the program wants one graph, told that it is on the
    device, which is noted.

    Args:
        redirection: in force.
        tx: the compiler's translator.
        variable: the compiler's tensor.
        api: what was asked for.

    Raises:
        torch._dynamo.exc.Unsupported: it is on the host.
    """
    proxy = getattr(variable, "proxy", None)
    if proxy is not None and proxy.node.meta.get(_ON_HOST):
        what = "in compiled code a tensor on the host counts as on the device"
        if redirection.strict or not tx.one_graph:
            raise _not_compiled(f"{api}: {what}")
        with redirection.audit.traced_at(tx.f_code, tx.lineno):
            redirection.change(api, what)
    redirection.audit.count_traced(api, tx.f_code, tx.lineno, belief=True)


def moved(redirection: Redirection, tx: Any, api: str) -> None:
    """Count that traced code moved a tensor, or made one like it."""
    if not is_insider(tx.f_globals.get("__name__")):
        redirection.audit.count_traced(api, tx.f_code, tx.lineno)


def _follow(redirection: Redirection, patches: Patches, kind: Any) -> None:
    import torch

    original: Callable[..., Any] = kind.inline_call.__func__
    made, modes = makers(), torch._C._len_torch_function_stack

    def inline_call(cls: Any, parent: Any, func: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        name = name_of(getattr(func, "fn", None))
        if name is None or is_insider(parent.f_globals.get("__name__")):
            return original(cls, parent, func, args, kwargs, *rest, **more)
        audit, place = redirection.audit, (parent.f_code, parent.lineno)
        device = kwargs.get("device")
        if name not in made or _is_cuda(redirection, device):
            entry = state.TABLE.get(name)
            audit.count_traced(name, *place, belief=entry is not None and entry.belief)
        with audit.traced_at(*place):
            found = original(cls, parent, func, args, kwargs, *rest, **more)
        if name in made and device is None and not name.endswith("_like") and not modes():
            mark_host(found)
        return found

    patches.set(kind, "inline_call", classmethod(inline_call))


def _is_cuda(redirection: Redirection, device: Any) -> bool:
    """Return whether the compiler's variable is a constant that names a CUDA device."""
    if device is None or not device.is_python_constant():
        return False
    given = device.as_python_constant()
    return redirection.translate(given) is not given


def mark_host(variable: Any) -> None:
    """Remember that the compiler's tensor is on the host."""
    proxy = getattr(variable, "proxy", None)
    if proxy is not None:
        proxy.node.meta[_ON_HOST] = True


def _mark_hosts(redirection: Redirection, patches: Patches, kind: Any) -> None:
    original, hosts = kind.__call__, redirection.hosts  # what it calls for tensors stands in a table that is kept
    assert hosts is not None

    def call(self: Any, value: Any) -> Any:
        found = original(self, value)
        if value in hosts:
            mark_host(found)
        return found

    patches.set(kind, "__call__", call)
