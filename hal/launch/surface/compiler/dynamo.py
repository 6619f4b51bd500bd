# SPDX-License-Identifier: Apache-2.0
"""torch.compile: code that is traced gets the same answers as code that is run.

The compiler does not call a tensor's properties, it has answers of its own, for the true device. They are replaced by
the rule that holds outside: torch's own modules get the truth. Which tensors are on the host is not known while code
is traced: there every tensor of the device's type counts as on the device.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from operator import is_
from types import CodeType
from typing import Any

from hal.launch.awaited import when_loaded
from hal.launch.caller import is_insider, is_ours
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.launch.stand_ins import seen
from hal.launch.surface.compiler import traced
from hal.torch_kernels import forget_compiled

_REPLACED_METHODS = ("to", "cuda", "cpu", "type", "pin_memory", "record_stream", "get_device", "is_pinned", "new_empty",
                     "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros", "numpy",
                     "type_as")  # fmt: skip


def install(redirection: Redirection, patches: Patches) -> None:
    """Change the compiler's answers, once somebody loads it: loading it takes longer than torch itself."""

    def tensors(variable: Any) -> None:
        _tensors(redirection, patches, variable)
        _devices(redirection, patches, variable)

    def devices(variable: Any) -> None:
        _devices(redirection, patches, variable)

    when_loaded("torch._dynamo.variables.tensor", "TensorVariable", tensors)
    when_loaded("torch._dynamo.variables.torch", "TorchInGraphFunctionVariable", devices)
    when_loaded("torch._dynamo.symbolic_convert", "InstructionTranslatorBase", lambda kind: _imports(patches, kind))
    when_loaded("torch._dynamo.trace_rules", "get_tensor_method", lambda function: _methods(patches, function))
    when_loaded("torch._dynamo.eval_frame", "skip_code", _not_by_themselves)
    forget_compiled()
    patches.on_undo(forget_compiled)


def _not_by_themselves(skip_code: Callable[[CodeType], None]) -> None:
    """Keep the compiler from compiling our functions where the program's own code is not compiled but run.

    It follows into calls of functions that it gave up, and would take ours for the program's.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("hal.launch."):
            for thing in vars(module).values():
                code = getattr(thing, "__code__", None)
                if isinstance(code, CodeType) and code.co_filename == module.__file__:
                    for part in _with_inner(code):
                        skip_code(part)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _with_inner(part)


def _tensors(redirection: Redirection, patches: Patches, variable: Any) -> None:
    from torch._dynamo.variables.base import VariableTracker

    true_device, true_is_cuda = variable.method_attr_device, variable.method_attr_is_cuda
    true_get_device, true_type = variable.method_get_device, variable.method_type

    def outside(tx: Any, self: Any) -> bool:
        return self.device is not None and not is_insider(tx.f_globals.get("__name__"))

    def method_attr_device(self: Any, tx: Any) -> Any:
        if not outside(tx, self):
            return true_device(self, tx)
        traced.asked(redirection, tx, self, "torch.Tensor.device")
        return VariableTracker.build(tx, redirection.present(self.device))

    def method_attr_is_cuda(self: Any, tx: Any) -> Any:
        if not outside(tx, self):
            return true_is_cuda(self, tx)
        traced.asked(redirection, tx, self, "torch.Tensor.is_cuda")
        return VariableTracker.build(tx, redirection.present(self.device).type == "cuda")

    def method_attr_is_cpu(self: Any, tx: Any) -> Any:
        if self.device is None:
            return None  # unknown: the compiler finds another way
        if outside(tx, self):
            traced.asked(redirection, tx, self, "torch.Tensor.is_cpu")
        on_cpu = self.device.type == "cpu" and (redirection.hosts is None or not outside(tx, self))
        return VariableTracker.build(tx, on_cpu)

    def method_get_device(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not outside(tx, self):
            return true_get_device(self, tx, *args, **kwargs)
        traced.asked(redirection, tx, self, "torch.Tensor.get_device")
        index = redirection.present(self.device).index
        return VariableTracker.build(tx, -1 if index is None else index)

    def method_type(self: Any, tx: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = true_type(self, tx, dtype, *args, **kwargs)
        ours = is_ours(tx.f_globals.get("__name__"))  # of what the program gave, our method is traced; else this is
        asker = tx.parent if ours else tx
        if dtype is not None or found is None or asker is None or not outside(asker, self):
            return found
        traced.asked(redirection, asker, self, "torch.Tensor.type")
        if ours or redirection.present(self.device).type != "cuda":
            return found
        return VariableTracker.build(tx, found.as_python_constant().replace("torch.", "torch.cuda.", 1))

    patches.set(variable, "method_attr_device", method_attr_device)
    patches.set(variable, "method_attr_is_cuda", method_attr_is_cuda)
    patches.set(variable, "method_attr_is_cpu", method_attr_is_cpu)
    for name, own, ours in (("get_device", true_get_device, method_get_device), ("type", true_type, method_type)):
        if "tx" in inspect.signature(own).parameters:  # older versions of torch give them none
            patches.set(variable, f"method_{name}", ours)


def _devices(redirection: Redirection, patches: Patches, variable: Any) -> None:
    """Translate what a function or a method of torch's is given as a device before it stands in the graph.

    The net below eager code is of no use here: a graph holds CUDA devices as they are, and what makes kernels from it
    would make them for CUDA. Such a device comes from torch's own code that is traced, with what the program gave it.
    """
    import torch
    from torch._dynamo.variables.base import VariableTracker

    kind = type(torch.empty(0, device="meta").device)  # the program may see another class under its name

    def true(tx: Any, given: Any, named: bool) -> Any:
        device = given.as_python_constant() if given.is_python_constant() else None
        if not isinstance(device, (kind, str) if named else kind):
            return given
        found = redirection.translate(device)
        return given if found is device else VariableTracker.build(tx, found)

    name = "call_method" if hasattr(variable, "method_attr_device") else "call_function"
    original = getattr(variable, name)

    def to_host(tx: Any, name: str, args: Any, kwargs: Any) -> bool:
        """Return whether the program moves a tensor to the host, where this cannot be seen from its device."""
        if redirection.hosts is None or name not in ("cpu", "to") or is_insider(tx.f_globals.get("__name__")):
            return False
        asked = args[0] if args else kwargs.get("device")
        named = asked is not None and asked.is_python_constant()
        return name == "cpu" or (named and redirection.is_host(asked.as_python_constant()))

    def call(self: Any, tx: Any, *given: Any) -> Any:
        *method, args, kwargs = given
        before = args, kwargs
        host = bool(method) and to_host(tx, given[0], args, kwargs)
        if method and method[0] == "cuda":
            method, args, kwargs = ["to"], *_as_to(tx, redirection, args, kwargs)
        args = [true(tx, argument, False) for argument in args]
        kwargs = {key: true(tx, argument, key == "device") for key, argument in kwargs.items()}
        if method and given[0] in _REPLACED_METHODS and not _same((args, kwargs), before):
            traced.moved(redirection, tx, f"torch.Tensor.{given[0]}")
        if method and method[0] in _REPLACED_METHODS and self.source is None:
            found = _by_modes(tx, method[0], (self, *args), kwargs)
            if found is not None:
                return found
        made = original(self, tx, *method, args, kwargs)
        if host:
            traced.mark_host(made)
        return made

    patches.set(variable, name, call)


def _same(call: tuple[list[Any], dict[str, Any]], other: tuple[list[Any], dict[str, Any]]) -> bool:
    """Return whether two calls have the same arguments, by identity."""
    return (len(call[0]) == len(other[0]) and all(map(is_, call[0], other[0])) and call[1].keys() == other[1].keys()
            and all(value is other[1][name] for name, value in call[1].items()))  # fmt: skip


def _as_to(
    tx: Any, redirection: Redirection, args: list[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments of `Tensor.to` for those of `Tensor.cuda`, which in a graph asks the true torch.cuda.

    Raises:
        RuntimeError: they name no CUDA device.
    """
    from torch._dynamo.variables.base import VariableTracker

    given = dict(zip(("device", "non_blocking", "memory_format"), args, strict=False)) | kwargs
    device = given.pop("device", None)
    asked = None if device is None else device.as_python_constant()
    index = redirection.index(asked)
    if index is None:
        raise RuntimeError(f"Invalid device, must be cuda device: {asked}")
    return [VariableTracker.build(tx, redirection.targets[index])], given


def _by_modes(tx: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the modes in force, such as that of the default device, make of a method; None: there is none.

    They are given the method. Of a tensor that comes from the graph the compiler would make it from nothing; and of
    what our function closes over it can make no more than constants from nothing.
    """
    import torch
    from torch._dynamo.source import AttrSource
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.torch_function import can_dispatch_torch_function, dispatch_torch_function

    if not can_dispatch_torch_function(tx, args, kwargs):
        return None
    source = AttrSource(AttrSource(tx.import_source("torch"), "Tensor"), name)
    return dispatch_torch_function(tx, VariableBuilder(tx, source)(getattr(torch.Tensor, name)), args, kwargs)


def _imports(patches: Patches, translator: Any) -> None:
    """Let code that is traced import what it would import otherwise; the compiler asks again for its guards."""
    from torch._dynamo.source import GlobalSource

    original = translator.import_source

    def import_source(self: Any, module_name: str) -> Any:
        if is_insider(self.f_globals.get("__name__")):
            return original(self, module_name)
        module = importlib.import_module(module_name)  # ours are insiders, and get the original
        stand_in = seen(module)
        if stand_in is module:
            return original(self, module_name)
        alias = f"__import_hal_{module_name.replace('.', '_dot_')}"
        self.output.import_sources[alias] = module_name
        self.output.global_scope[alias] = stand_in
        self.output.update_co_names(alias)
        return GlobalSource(alias)

    patches.set(translator, "import_source", import_source)


def _methods(patches: Patches, function: Any) -> None:
    """Tell the compiler that the methods which were replaced on tensors are torch's own below."""
    import torch
    import torch._dynamo.trace_rules as rules

    known = function() | {getattr(torch._C.TensorBase, name) for name in _REPLACED_METHODS}
    patches.set(rules, "get_tensor_method", functools.cache(lambda: known))  # torch clears its cache
