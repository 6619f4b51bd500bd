# SPDX-License-Identifier: Apache-2.0
"""Tensors and modules: where they are, and moving them.

These are replaced on the classes, so that every caller meets them: torch's own modules pass on what the program gave
them. What depends on the caller is the answer to "where are you?", which torch's own modules get truthfully.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.launch import api
from hal.launch.api import door
from hal.launch.caller import inside
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection, is_number
from hal.launch.surface.tensors.factories import pinned

if TYPE_CHECKING:
    import torch

door(
    "torch.Tensor.device", "torch.Tensor.is_cuda", "torch.Tensor.is_cpu", "torch.Tensor.get_device", "torch.Tensor.to",
    "torch.Tensor.cuda", "torch.Tensor.cpu", "torch.Tensor.type", "torch.Tensor.new", "torch.Tensor.new_tensor",
    "torch.Tensor.new_empty",
    "torch.Tensor.new_empty_strided", "torch.Tensor.new_zeros", "torch.Tensor.new_ones", "torch.Tensor.new_full",
    "torch.Tensor.histc", "torch.Tensor.type_as", "torch.Tensor.numpy", "torch.nn.Module.to", "torch.nn.Module.cuda",
    "torch.nn.Module.cpu", "torch.nn.Module.to_empty", "torch.Tensor._make_wrapper_subclass",
)  # fmt: skip
door("torch.Tensor.pin_memory", "torch.Tensor.is_pinned", "torch.Tensor.record_stream", verdict="emulated",
     note="nothing to do on a CPU")  # fmt: skip


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the attributes of tensors and modules."""
    import torch

    tensor, originals = torch.Tensor, set[Any]()
    for name, make in {
        "device": _device, "is_cuda": _is_cuda, "is_cpu": _is_cpu, "get_device": _get_device,
        "to": _to, "cuda": _cuda, "cpu": _cpu, "type": _type, "pin_memory": _pin_memory, "is_pinned": _is_pinned,
        "record_stream": _record_stream,
        "new": _new, "new_tensor": _new, "new_empty": _new, "new_empty_strided": _new, "new_zeros": _new,
        "new_ones": _new, "new_full": _new, "type_as": _type_as, "numpy": _numpy,
    }.items():  # fmt: skip
        original = getattr(tensor, name)
        originals.add(original)
        patches.set(tensor, name, make(f"torch.Tensor.{name}", original, redirection))
    patches.set(tensor, "_make_wrapper_subclass", staticmethod(_wrapper(tensor._make_wrapper_subclass)))
    _stay_methods(originals, patches)
    _let_lazy_parameters_move(patches)
    _install_modules(redirection, patches)


def _wrapper(original: Any) -> Callable[..., Any]:
    """Return what makes tensors that wrap others: they are where the others really are."""

    def make_wrapper_subclass(*args: Any, **kwargs: Any) -> Any:
        r = api._active
        if r is not None and kwargs.get("device") is not None:
            kwargs["device"] = r.translate(kwargs["device"])
        return original(*args, **kwargs)

    return make_wrapper_subclass


def _stay_methods(originals: set[Any], patches: Patches) -> None:
    """Let those that were replaced count as methods of tensors: modes and tracers are given them.

    torch collects the methods once, when it is first asked; what it collected while they are replaced is forgotten.
    """
    import torch

    overrides: Any = torch.overrides
    own = overrides.is_tensor_method_or_property
    collected = overrides._get_tensor_methods, overrides._get_overridable_functions
    patches.set(overrides, "is_tensor_method_or_property", lambda func: func in originals or own(func))
    if not collected[0].cache_info().currsize:
        for function in collected:
            patches.on_undo(function.cache_clear)


def _let_lazy_parameters_move(patches: Patches) -> None:
    """Parameters without a shape yet know by identity which methods they allow."""
    import torch
    import torch.nn.parameter as parameter

    owner: Any = vars(parameter)["UninitializedTensorMixin"]
    allowed = owner._allowed_methods
    names = {method.__name__ for method in allowed}
    ours = [getattr(torch.Tensor, name) for name in ("to", "cuda", "cpu", "get_device") if name in names]
    patches.set(owner, "_allowed_methods", [*allowed, *ours])


# Where a tensor is -------------------------------------------------------------------------------------------------


def _device(name: str, original: Any, redirection: Redirection) -> property:
    get, present, hosts, count = original.__get__, redirection.present, redirection.hosts, redirection.audit.count
    import torch

    host = torch.device("cpu")

    def device(self: torch.Tensor) -> torch.device:
        true: torch.device = get(self)
        frame = sys._getframe(1)
        if api._active is None or inside(frame):
            return true
        if hosts is not None and self in hosts:
            return host
        count(name, frame, belief=True)
        return present(true)

    return property(device, doc=original.__doc__)


def _is_cuda(name: str, original: Any, redirection: Redirection) -> property:
    get, hosts, count = original.__get__, redirection.hosts, redirection.audit.count

    def is_cuda(self: torch.Tensor) -> bool:
        frame = sys._getframe(1)
        if api._active is None or inside(frame):
            answer: bool = get(self)
            return answer
        if hosts is not None and self in hosts:
            return False
        count(name, frame, belief=True)
        return device_of(self).type == redirection.type

    device_of = _true_device()
    return property(is_cuda, doc=original.__doc__)


def _is_cpu(name: str, original: Any, redirection: Redirection) -> property:
    get, hosts, count = original.__get__, redirection.hosts, redirection.audit.count

    def is_cpu(self: torch.Tensor) -> bool:
        true: bool = get(self)
        frame = sys._getframe(1)
        if not true or hosts is None or api._active is None or inside(frame):
            return true
        if self in hosts:
            return True
        count(name, frame, belief=True)
        return False

    return property(is_cpu, doc=original.__doc__)


def _true_device() -> Callable[[torch.Tensor], torch.device]:
    import torch

    return torch._C.TensorBase.device.__get__


def _get_device(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    true_device, hosts = _true_device(), redirection.hosts

    def get_device(self: torch.Tensor) -> int:
        frame = sys._getframe(1)
        if api._active is None or inside(frame):
            answer: int = original(self)
            return answer
        if hosts is not None and self in hosts:
            return -1
        redirection.audit.count(name, frame, belief=True)
        index = redirection.present(true_device(self)).index
        return -1 if index is None else index

    return get_device


# Moving a tensor ---------------------------------------------------------------------------------------------------


def _to(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    import torch

    kinds, others = (str, torch.device, int), (torch.dtype, torch.Tensor)
    hosts, translate, is_host = redirection.hosts, redirection.translate, redirection.is_host
    true_devices = redirection.true_devices
    tensor, device, count_outside, convert = torch.Tensor, torch.device, redirection.audit.count_outside, _convert()
    from torch.compiler import is_dynamo_compiling

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if api._active is None:
            return original(self, *args, **kwargs)
        asked, frame = args[0] if args else kwargs.get("device"), None
        if not is_dynamo_compiling():
            frame = sys._getframe(1)
            # torch's own calls: clipping makes one for each parameter. Not asked for its type: a device makes a text
            # of that, which takes as long as all the rest.
            if type(asked) is device and asked in true_devices and inside(frame) and frame.f_code is not convert:
                return original(self, *args, **kwargs)
        positional = bool(args)
        if not isinstance(asked, device):
            positional = positional and isinstance(asked, kinds) and not isinstance(asked, bool)
            asked = asked if positional else kwargs.get("device")
            if asked is None and args and not isinstance(args[0], others) and is_number(args[0]):  # of numpy's
                positional, asked = True, args[0]
        if asked is None:
            if hosts is None or frame is None or not (args and isinstance(args[0], tensor)):
                moved = original(self, *args, **kwargs)
                if hosts is not None and frame is not None and self in hosts and moved is not self:
                    hosts.add(moved)
                return moved
            # to(other): where the other one is.
            count_outside(name, frame)
            return hosts.moved(self, original(self, *args, **kwargs), args[0] in hosts)
        true = asked if isinstance(asked, device) and asked.type != "cuda" else translate(asked)
        if true is asked:  # no CUDA device
            moved = original(self, *args, **kwargs)
            if hosts is None or frame is None or not is_host(asked):
                return moved
            # A module's tensors, also where a class or the program stands between with a `to` of its own.
            if redirection.moving is not None and isinstance(asked, device) and _is_called_by(convert, frame):
                return hosts.moved(self, moved, redirection.moving)
            return moved if inside(frame) else hosts.moved(self, moved, True)
        if frame is not None:
            count_outside(name, frame)
        if positional:
            args = (true, *args[1:])
        else:
            kwargs["device"] = true
        moved = original(self, *args, **kwargs)
        return moved if hosts is None or frame is None else hosts.moved(self, moved, False)

    return to


def _is_called_by(code: Any, frame: Any) -> bool:
    """Return whether a frame is of a function, or was called from one that is."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _convert() -> Any:
    """Return the code of the function by which `torch.nn.Module.to` moves each tensor."""
    import torch

    to: Any = torch.nn.Module.to
    inner = (constant for constant in to.__code__.co_consts if getattr(constant, "co_name", "") == "convert")
    return next(inner, None)


def _cuda(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    from torch.compiler import is_dynamo_compiling

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        r = api._active
        if r is None:
            return original(self, device, non_blocking, **kwargs)  # type: ignore[no-any-return]
        if not is_dynamo_compiling():
            r.audit.count_outside(name, sys._getframe(1))
        index = r.index(device)
        if index is None:
            raise RuntimeError(f"Invalid device, must be cuda device: {device}")
        return self.to(f"cuda:{index}", non_blocking=non_blocking, **kwargs)

    return cuda


def _cpu(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    import torch
    from torch.compiler import is_dynamo_compiling

    to, true_device = torch._C.TensorBase.to, _true_device()

    def cpu(self: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        r = api._active
        if r is None or r.hosts is None or is_dynamo_compiling():
            return original(self, **kwargs)  # type: ignore[no-any-return]
        if true_device(self).type != r.type or self in r.hosts:
            return original(self, **kwargs)  # type: ignore[no-any-return]
        # On CUDA this is a copy, which does not follow what the program does with the tensor on the device; so it is
        # where torch's own code calls it, as for a state that is kept on the host.
        return r.hosts.add(to(self, "cpu", copy=True, **kwargs))

    return cpu


def _pin_memory(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        r = api._active
        if r is None:
            return original(self, device)  # type: ignore[no-any-return]
        r.audit.count_outside(name, sys._getframe(1))
        return r.device.memory.pin(self) if r.hosts is None else r.hosts.pin(self)

    return pin_memory


def _is_pinned(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    def is_pinned(self: torch.Tensor, device: Any = None) -> bool:
        r = api._active
        if r is None:
            return original(self, device)  # type: ignore[no-any-return]
        return r.hosts.is_pinned(self) if r.hosts is not None else bool(original(self, r.translate(device)))

    return is_pinned


def _record_stream(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    def record_stream(self: torch.Tensor, stream: Any) -> None:
        r = api._active
        if r is None:
            original(self, stream)
            return
        r.audit.count_outside(name, sys._getframe(1))
        # Without streams memory is free when its tensor is.
        if r.hosts is None:
            original(self, stream)

    return record_stream


def _new(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    from torch.compiler import is_dynamo_compiling

    def new(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        r = api._active
        device, pins = kwargs.get("device"), False
        if r is None:
            return original(self, *args, **kwargs)  # type: ignore[no-any-return]
        if device is not None:
            kwargs["device"] = r.translate(device)
            if kwargs["device"] is not device and not is_dynamo_compiling():
                r.audit.count_outside(name, sys._getframe(1))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = pinned(r, device)
            pins = True
        made: torch.Tensor = original(self, *args, **kwargs)
        shared = bool(args) and hasattr(args[0], "data_ptr") and name.endswith(".new")  # memory that it was given
        if r.hosts is None or shared or is_dynamo_compiling():
            return made
        if pins:
            return r.hosts.add_pinned(made)
        if device is None:
            known = r.hosts.side(self)
        elif kwargs["device"] is not device:
            known = False
        else:
            known = True if r.is_host(device) and not inside(sys._getframe(1)) else None
        return made if known is None else r.hosts.add(made) if known else r.hosts.add_device(made)

    return new


def _type_as(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    from torch.compiler import is_dynamo_compiling

    def type_as(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        r, moved = api._active, original(self, other)
        if r is None or r.hosts is None or is_dynamo_compiling() or inside(frame := sys._getframe(1)):
            return moved  # type: ignore[no-any-return]
        r.audit.count(name, frame)
        return r.hosts.moved(self, moved, other in r.hosts)

    return type_as


def _numpy(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    from torch.compiler import is_dynamo_compiling

    def numpy(self: torch.Tensor, *, force: bool = False) -> Any:
        r = api._active
        if force and r is not None and r.hosts is not None and not is_dynamo_compiling():
            self = self.detach().cpu()  # a copy, if the tensor may be on the device
        return original(self, force=force)

    return numpy


def _type(name: str, original: Any, redirection: Redirection) -> Callable[..., Any]:
    import torch
    from torch.compiler import is_dynamo_compiling

    from hal.launch.surface.cuda.tensor_types import CudaTensorType

    true_device = _true_device()

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        r = api._active
        if r is None:
            return original(self, dtype, non_blocking, **kwargs)
        frame = None if is_dynamo_compiling() else sys._getframe(1)
        if dtype is None:
            plain = original(self)
            if true_device(self).type != r.type:
                return plain
            if frame is not None:
                if inside(frame) or (r.hosts is not None and self in r.hosts):
                    return plain
                r.audit.count(name, frame, belief=True)
            return "torch.cuda." + plain.rpartition(".")[2]
        # A module hands its tensors what the program gave it.
        named = isinstance(dtype, str) and dtype.startswith("torch.cuda.")
        if not (named or isinstance(dtype, CudaTensorType)):
            made = original(self, dtype, non_blocking, **kwargs)
            if r.hosts is None or frame is None or isinstance(dtype, torch.dtype) or inside(frame):
                return made
            return r.hosts.moved(self, made, True)  # "torch.FloatTensor": the old way to say `.cpu().float()`
        if frame is not None:
            r.audit.count_outside(name, frame)
            self = self.to("cuda")
        if named:
            return original(self, dtype.replace("torch.cuda.", "torch.", 1), non_blocking, **kwargs)
        return self.to(dtype.torch_dtype)

    return type_


# Modules -------------------------------------------------------------------------------------------------------------


def _parse_to(original: Callable[..., Any], index: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return what reads the arguments of `Module.to`, for libraries with a `to` of their own."""

    def parse_to(*args: Any, **kwargs: Any) -> Any:
        other: Any = args[0] if args else kwargs.get("tensor")
        if is_number(other):
            args = (index(other), *args[1:])
        elif is_number(kwargs.get("device")):
            kwargs["device"] = index(kwargs["device"])
        device, *rest = original(*args, **kwargs)
        r = api._active
        if r is not None and hasattr(other, "data_ptr"):
            device = device if r.hosts is not None and other in r.hosts else r.present(device)
        return device, *rest

    return parse_to


def _install_modules(redirection: Redirection, patches: Patches) -> None:
    import torch

    def device_of_index(index: Any) -> Any:
        return index if api._active is None else torch.device("cuda", api._active.checked(operator.index(index)))

    patches.set(torch._C._nn, "_parse_to", _parse_to(torch._C._nn._parse_to, device_of_index))
    module = torch.nn.Module
    original_to, original_cuda, original_cpu, original_to_empty = module.to, module.cuda, module.cpu, module.to_empty

    def moved_to(self: Any, host: bool, *args: Any, **kwargs: Any) -> Any:
        """Let torch move a module; each of its tensors meets `torch.Tensor.to` above, and crosses there."""
        outer, redirection.moving = redirection.moving, host
        try:
            return original_to(self, *args, **kwargs)
        finally:
            redirection.moving = outer

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        r = api._active
        if r is None:
            return original_to(self, *args, **kwargs)
        asked = args[0] if args else kwargs.get("device")
        other = kwargs.get("tensor", asked)
        if isinstance(other, torch.Tensor) and r.hosts is not None:
            return moved_to(self, other in r.hosts, *args, **kwargs)
        known = isinstance(asked, (str, torch.device)) or is_number(asked)
        if not known:
            return original_to(self, *args, **kwargs)
        true = r.translate(asked)
        if true is asked:
            return moved_to(self, True, *args, **kwargs) if r.is_host(asked) else original_to(self, *args, **kwargs)
        r.audit.count_outside("torch.nn.Module.to", sys._getframe(1))
        if args:
            args = (true, *args[1:])
        else:
            kwargs["device"] = true
        return moved_to(self, False, *args, **kwargs)

    def cuda(self: Any, device: Any = None) -> Any:
        r = api._active
        if r is None:
            return original_cuda(self, device)
        r.audit.count_outside("torch.nn.Module.cuda", sys._getframe(1))
        return to(self, f"cuda:{r.current if device is None else r.index(device)}")

    def cpu(self: Any) -> Any:
        return original_cpu(self) if api._active is None else to(self, "cpu")

    def to_empty(self: Any, *, device: Any, recurse: bool = True) -> Any:
        r = api._active
        true = device if r is None else r.translate(device)
        made = original_to_empty(self, device=true, recurse=recurse)
        if r is not None and r.hosts is not None and device is not None:
            if true is not device:
                r.audit.count_outside("torch.nn.Module.to_empty", sys._getframe(1))
            if true is not device or (r.is_host(device) and not inside(sys._getframe(1))):
                for tensor in (*self.parameters(recurse), *self.buffers(recurse)):
                    r.hosts.add(tensor) if true is device else r.hosts.add_device(tensor)
        return made

    patches.set(module, "to_empty", to_empty)
    patches.set(module, "to", to)
    patches.set(module, "cuda", cuda)
    patches.set(module, "cpu", cpu)
