# SPDX-License-Identifier: Apache-2.0
"""What an implementation could leave changed in the process: switches of torch and numpy, seeds, folder, environment.

An operator may set what it likes while it computes. What it leaves set changes the results of whatever comes after it,
in a training as in this suite, and there the fault would show in another operator's name.

Who draws a random number moves its generator, which is no fault; generators are put back all the same, so that no case
depends on those before it. A seed is another matter: who sets one decides what everybody else draws. That shows in
torch, whose generators know their seed; Python's and numpy's do not. Replaced functions (`Tensor.softmax = mine`) are
no part of it: there is no end to what would have to be compared.
"""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from hal.fp32_switch import has_fp32_switches, own_value
from hal_conformance.text import plain

SHOWN = 3
"""Of what was left changed; the rest is counted."""

_C: Any = torch._C
_NO_SWITCHES = frozenset(
    {
        "_get_tracing_state", "_get_value_trace", "_get_graph_exec_group", "_get_tensor_metadata", "_get_thread_name",
        "_get_dispatch_mode", "_get_torch_function_state", "_get_warnAlways", "_get_qengine",
    }
)  # fmt: skip
"""What torch can get and set that is no setting: a tracer's state, a thread's name; or none of numbers."""
_OF_THEIR_OWN = frozenset({"_get_deterministic_algorithms"})
"""Switches whose setter takes more than the value that is read."""
_TINY = 1e-310
_guards: list[Any] = []
"""Inference modes that were ended for somebody who left one; each lasts as long as its object."""


@dataclass(frozen=True)
class Kind:
    """One thing that can be left changed.

    Attributes:
        name: for the reader.
        read: returns it; what it raises counts as a value.
        write: sets it to what `read` returned before. What it raises is ignored: the process is then not restored.
        told: whether leaving it changed is a fault. The number of threads changes no more than an order of sums, and an
            implementation may want another one; random numbers may be drawn: these are put back without a word.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    told: bool = True


class ProcessState:
    """The state at the moment of construction, to which it can be put back.

    Args:
        device_type: of the tensors, such as `cuda`, for autocast and the current stream.
    """

    def __init__(self, device_type: str) -> None:
        self._kinds = tuple(kinds(device_type))
        self._reads = tuple(kind.read for kind in self._kinds)
        self._values = self._now()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of everything that is compared."""
        return tuple(kind.name for kind in self._kinds)

    def put_back(self) -> tuple[str, bool]:
        """Put back whatever is not as it was.

        Returns:
            What was left changed, as a phrase, empty if nothing was; and whether everything is as it was now. If it is
            not, this process can be trusted with no further case.
        """
        now = self._now()
        if now == self._values:
            return "", True
        phrases = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for at, kind in enumerate(self._kinds):
                if now[at] != self._values[at] and kind.told:
                    phrases.append(f"{kind.name} at {plain(now[at], 60)}")
                if _read(kind.read) != self._values[at]:  # one that was put back may have moved another
                    _try(kind.write, self._values[at])
        more = f" and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
        said = f"left {', '.join(phrases[:SHOWN])}{more}" if phrases else ""
        return said, self._now() == self._values

    def _now(self) -> list[Any]:
        try:
            return [read() for read in self._reads]
        except Exception:  # noqa: BLE001  two switches contradict each other, or there is none
            return [_read(read) for read in self._reads]


def kinds(device_type: str) -> Iterator[Kind]:
    """Yield what is compared, in the order in which it is to be put back: what moves others comes before them."""
    yield Kind("numpy's reactions to floating-point errors", np.geterr, lambda value: np.seterr(**value))
    yield Kind("numpy's handler of floating-point errors", np.geterrcall, np.seterrcall)
    yield Kind("the flushing of denormals", lambda: _TINY * 0.5 == 0, torch.set_flush_denormal)
    yield Kind("torch's number of threads", torch.get_num_threads, torch.set_num_threads, told=False)
    yield Kind("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield Kind("torch's default device", _default_device, torch.set_default_device)
    yield Kind("torch's function modes", _C._len_torch_function_stack, _pop_function_modes)
    yield Kind("torch's dispatch modes", _C._len_torch_dispatch_stack, _pop_dispatch_modes)
    yield Kind("torch's inference mode", torch.is_inference_mode_enabled, _set_inference_mode)
    yield Kind("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled)
    yield Kind(
        "torch's anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.set_anomaly_enabled(*value),
    )
    yield Kind("autograd's multithreading", _C._is_multithreading_enabled, torch.autograd.set_multithreading_enabled)
    hooks = _C._autograd
    if hasattr(hooks, "_top_saved_tensors_default_hooks"):  # torch 2.7 has it
        yield Kind("hooks of saved tensors", lambda: hooks._top_saved_tensors_default_hooks(False), _pop_hooks)
    for of in dict.fromkeys(("cpu", device_type)):
        if _C._is_autocast_available(of):
            yield Kind(f"autocast on {of}", *_autocast(of))
    yield Kind("the nesting of autocast", _nesting, _set_nesting)
    yield Kind("the cache of autocast", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)
    yield Kind(
        "deterministic algorithms",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    )
    einsum: dict[str, Any] = vars(vars(torch.backends.opt_einsum)["m"])  # its attributes are slow to read
    yield Kind(
        "torch.backends.opt_einsum",
        lambda: (einsum["enabled"], einsum["strategy"]),
        lambda value: einsum.update(enabled=value[0], strategy=value[1]),
    )
    yield from _switches()
    if has_fp32_switches():
        # "all" before its operations, which may inherit it.
        for operation, library in product(("all", "matmul", "conv", "rnn"), ("generic", "cuda", "mkldnn")):
            if (library, operation) == ("generic", "all") or library != "generic":
                yield _fp32(library, operation)
    yield Kind("the working directory", os.getcwd, os.chdir)
    yield _environment()
    yield from _generators(device_type)
    if device_type != "cpu" and hasattr(torch, "accelerator"):
        accelerator: Any = torch.accelerator
        for name, get, put in (("device", "current_device_index", "set_device_index"),
                               ("stream", "current_stream", "set_stream")):  # fmt: skip
            if not isinstance(_read(getattr(accelerator, get)), Unread):
                yield Kind(f"the current {name}", getattr(accelerator, get), getattr(accelerator, put))


@dataclass(frozen=True)
class Variables:
    """Environment variables, of which the names may be shown and the values, which may be secrets, may not.

    Attributes:
        held: name and value; None: it is not set.
        first: what was held at first.
    """

    held: dict[Any, Any]
    first: dict[Any, Any]

    def __str__(self) -> str:
        names = (os.fsdecode(name) for name, value in self.held.items() if value != self.first[name])
        return f"other values of {', '.join(names)}"


def _environment() -> Kind:
    """Compare the variables that there are. What is added is left: compilers note the folder of their cache so."""
    data: dict[Any, Any] = getattr(os.environ, "_data")  # noqa: B009  its items without decoding all of them
    first = dict(data)

    def write(then: Variables) -> None:
        for name, value in then.held.items():
            if data.get(name) != value:
                os.environ[os.fsdecode(name)] = os.fsdecode(value)

    return Kind("the environment", lambda: Variables({name: data.get(name) for name in first}, first), write)


def _generators(device_type: str) -> Iterator[Kind]:
    """Yield seeds before the states in which they are a part."""
    ours = torch.default_generator
    yield Kind("the seed of torch's random numbers", ours.initial_seed, ours.manual_seed)
    if device_type != "cpu":
        module = getattr(torch, device_type, None)
        read, write = getattr(module, "initial_seed", None), getattr(module, "manual_seed", None)
        if read is not None and write is not None and not isinstance(_read(read), Unread):
            yield Kind(f"the seed of {device_type}'s random numbers", read, write)
    yield Kind(
        "the state of torch's random numbers",
        lambda: ours.get_state().numpy().tobytes(),
        lambda state: ours.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        told=False,
    )
    yield Kind("the state of Python's random numbers", random.getstate, random.setstate, told=False)
    yield Kind("the state of numpy's random numbers", _of_numpy, _to_numpy, told=False)


def _of_numpy() -> tuple[Any, ...]:
    name, key, *rest = np.random.get_state()
    return (name, np.asarray(key).tobytes(), *rest)


def _to_numpy(state: tuple[Any, ...]) -> None:
    name, key, *rest = state
    np.random.set_state((name, np.frombuffer(key, np.uint32), *rest))


@dataclass(frozen=True)
class Unread:
    """In place of a value: what reading it raised."""

    kind: str

    def __str__(self) -> str:
        return f"what cannot be read ({self.kind})"


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # noqa: BLE001  see above
        return Unread(type(error).__name__)


def _try(write: Callable[[Any], object], value: Any) -> None:
    with contextlib.suppress(Exception):  # whoever calls looks whether it helped
        write(value)


def _switches() -> Iterator[Kind]:
    """Yield whatever torch can both get and set without a further argument: every vendor's, and the next release's."""
    for name in dir(_C):
        if not name.startswith("_get_") or name in _NO_SWITCHES | _OF_THEIR_OWN:
            continue
        setter = name.replace("_get_", "_set_", 1)
        if name.endswith("_sdp_enabled"):
            setter = f"_set_sdp_use_{name.removeprefix('_get_').removesuffix('_sdp_enabled')}"
        write = getattr(_C, setter, None)
        read = getattr(_C, name)
        # The first reading tells whether it wants an argument.
        if write is None or isinstance(value := _read(read), Unread):
            continue
        if hasattr(value, "__members__"):  # equality of pybind11's enums takes 5 microseconds, that of integers none
            read, write = _numbered(read), _from_number(write, type(value))
        elif isinstance(value, tuple):
            write = _spread(write)
        yield Kind(f"torch's {name.removeprefix('_get_')}", read, write)


def _numbered(read: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: int(read())


def _from_number(write: Callable[[Any], object], kind: type) -> Callable[[Any], object]:
    return lambda value: write(kind(value))


def _spread(write: Callable[..., object]) -> Callable[[Any], object]:
    return lambda values: write(*values)


def _fp32(library: str, operation: str) -> Kind:
    own = own_value(library, operation)
    getter, setter = _C._get_fp32_precision_getter, _C._set_fp32_precision_setter
    # Read is the value in force, and written the node's own, which may be to inherit.
    return Kind(
        f"the fp32_precision of {library} {operation}",
        lambda: getter(library, operation),
        lambda _: setter(library, operation, own),
    )


def _default_device() -> Any:
    context = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    return None if context is None else context.device


def _pop_function_modes(depth: int) -> None:
    while _C._len_torch_function_stack() > depth:
        _C._pop_torch_function_stack()


def _pop_dispatch_modes(depth: int) -> None:
    from torch.utils._python_dispatch import _pop_mode

    while _C._len_torch_dispatch_stack() > depth:
        _pop_mode()


def _pop_hooks(pair: Any) -> None:
    while (top := _C._autograd._top_saved_tensors_default_hooks(False)) is not None and top != pair:
        _C._autograd._pop_saved_tensors_default_hooks()


def _set_inference_mode(value: bool) -> None:
    guard = _C._InferenceMode(value)
    guard.__enter__()
    _guards.append(guard)


def _autocast(device_type: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    def read() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def write(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device_type, value[0])
        torch.set_autocast_dtype(device_type, value[1])

    return read, write


def _nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_nesting(depth: int) -> None:
    while _nesting() > depth:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
