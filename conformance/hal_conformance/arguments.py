# SPDX-License-Identifier: Apache-2.0
"""Whether an operator writes into what it is given: no operator of `hal.moe` may, forward or backward.

A case is given tensors, which the worker compares when it has run, and makes others of them: views, slices, copies of
another dtype, states, upstream gradients. All of these pass through here. Before a call each is copied, and compared
after it and after the backward pass, in which a kernel may take the memory of what it has saved for scratch.

Of a tensor that the case made the whole storage is compared, since what lies around a slice is nobody's to write into;
of one that an operator returned before only its elements are, and only after a call: around it lies its maker's own
memory. Not seen is what is written and put back before the operator returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hal.moe.optimizer_ops import OptimizerOps
from hal_conformance.case import Malformed

if TYPE_CHECKING:
    import torch

_WATCHED: ContextVar[Watched | None] = ContextVar("watched", default=None)


NEW = frozenset(name for name in vars(OptimizerOps) if not name.startswith("_"))
"""Operators whose results lie in memory of their own: the caller overwrites what it gave."""


class Watched:
    """Operators whose arguments are compared before and after each call.

    Args:
        ops: the operators; what is no method of theirs is as it is there.
        compared: tensors whose elements somebody else compares; of these only the version counter is looked at.
    """

    def __init__(self, ops: Any, compared: Iterable[torch.Tensor]) -> None:
        self._ops = ops
        self._compared = {_storage_of(tensor) for tensor in compared}
        self._returned: dict[int, Any] = {}  # storages by address; a weak reference keeps the address, not the memory
        self._for_backward: list[_Given] = []
        self._written: list[tuple[str, torch.Tensor | bool]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if not callable(found):
            return found

        def operator(*args: Any, **named: Any) -> Any:
            return self._call(name, found, args, named)

        return operator

    def _call(self, name: str, operator: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given = self._taken(f"{name} wrote into its argument", [*args, *named.values()])
        made = operator(*args, **named)
        for one in given:
            self._written += one.written()
        results = list(_tensors(made))
        if any(tensor.requires_grad for _, tensor in results):
            alive = [one for one in self._for_backward if one.of() is not None]
            self._for_backward = alive + [one for one in given if one.whole and one.copy is not None]
        taken = {_storage_of(one.tensor) for one in given}
        if name in NEW and any(tensor.numel() and _storage_of(tensor) in taken for _, tensor in results):
            self._written.append((f"{name} returned the memory of an argument, and promises new tensors", True))
        ours = taken | self._compared
        for _, tensor in results:
            if (at := _storage_of(tensor)) not in ours:
                self._returned[at] = _weak_reference(tensor)
        for one in given:
            one.let_go()
        return made

    def _taken(self, what: str, given: Any) -> list[_Given]:
        found: list[_Given] = []
        for path, tensor in _tensors(given):
            at = _storage_of(tensor)
            whole = at not in self._returned
            found.append(
                _Given(f"{what} {path}", tensor, whole, None if at in self._compared else _copy(tensor, whole))
            )
        return found

    @contextmanager
    def backward(self, upstream: Iterable[torch.Tensor | None], *, again: bool) -> Iterator[None]:
        """Run a backward pass inside: what operators were given, and the gradients from upstream, stay as they are.

        Args:
            upstream: what it starts from.
            again: whether another pass over the same graph follows.
        """
        given = self._taken("the backward pass wrote into its upstream gradient", list(upstream))
        try:
            yield
        except RuntimeError:
            self.check()  # autograd refuses what was written into meanwhile, without a word on who did it
            raise
        for one in (*given, *self._for_backward):
            self._written += one.written("in the backward pass, " if one not in given else "")
        if not again:
            self._for_backward = []

    def check(self) -> None:
        """Raise what was found.

        Raises:
            Malformed: an operator wrote into an argument, or returned its memory.
        """
        for what, written in self._written:
            if bool(written):
                raise Malformed(what)


@contextmanager
def watched(ops: Any, compared: Iterable[torch.Tensor]) -> Iterator[Watched]:
    """Watch the operators of a case that runs inside, and its backward passes."""
    watching = Watched(ops, compared)
    token = _WATCHED.set(watching)
    try:
        yield watching
    finally:
        _WATCHED.reset(token)


@contextmanager
def backward_pass(upstream: Sequence[torch.Tensor | None] = (), *, again: bool = False) -> Iterator[None]:
    """Run a backward pass inside, and look at it if somebody watches; see `Watched.backward`."""
    if (watching := _WATCHED.get()) is None:
        yield
        return
    with watching.backward(upstream, again=again):
        yield


@dataclass(eq=False)
class _Given:
    """One tensor as it was before a call.

    Attributes:
        what: what is said if it is not as it was.
        tensor: itself, until it is let go: what nobody else holds any more nobody will miss.
        whole: whether all of its storage is compared.
        copy: of its bytes, None: they are not compared.
    """

    what: str
    tensor: torch.Tensor | None
    whole: bool
    copy: torch.Tensor | None

    def __post_init__(self) -> None:
        assert self.tensor is not None
        self.of = weakref.ref(self.tensor)
        self.layout = _layout(self.tensor, self.whole)

    def let_go(self) -> None:
        """Hold the tensor no longer."""
        self.tensor = None

    def written(self, when: str = "") -> Iterator[tuple[str, torch.Tensor | bool]]:
        """Yield what is to be said, and whether it is to be, which need not be known yet."""
        tensor = self.of()
        if tensor is None:
            return
        if _layout(tensor, self.whole) != self.layout:
            yield f"{when}{self.what}", True
        elif self.copy is not None:
            yield f"{when}{self.what}", _differ(_bytes(tensor, self.whole), self.copy)


def _layout(tensor: torch.Tensor, whole: bool) -> tuple[object, ...]:
    """Return what an operation in place, or another storage in the place of a tensor's, changes.

    A version is counted for all of a storage, which may be its maker's to write into.
    """
    version = tensor._version if whole and not tensor.is_inference() else None
    return version, _storage_of(tensor), tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def _tensors(given: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors that lie in memory, in lists and tuples too, and where: "2" or "1.w1_EFD"."""
    import torch

    if isinstance(given, torch.Tensor):
        if type(given) in (torch.Tensor, torch.nn.Parameter) and has_elements(given):
            yield path, given
    elif isinstance(given, list | tuple):
        names = getattr(given, "_fields", range(len(given)))
        for name, item in zip(names, given, strict=False):
            yield from _tensors(item, f"{path}.{name}" if path else str(name))


def _storage_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.untyped_storage()._cdata)


def _weak_reference(tensor: torch.Tensor) -> Any:
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def has_elements(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor lies in memory: a fake one, or one that stands for another while it is traced, does not.

    An address of zero says so only where a device's tensors have addresses; a device that keeps its elements elsewhere
    may give none to any.
    """
    import torch

    if torch._is_functional_tensor(tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    try:
        if tensor.untyped_storage().device.type == "meta":
            return False
        if not tensor.numel() or tensor.data_ptr():
            return True
        return not torch.empty(1, device=tensor.device).data_ptr()
    except RuntimeError:  # of tensors without a storage
        return False


def dense_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the bytes of a tensor's elements, in order."""
    import torch

    dense = torch.clone(tensor.detach(), memory_format=torch.contiguous_format)
    return dense.view(-1).view(torch.uint8)  # the strides of what is cloned so are 1 even for one element


def _bytes(tensor: torch.Tensor, whole: bool) -> torch.Tensor:
    """Return the bytes of all of a tensor's storage, or a copy of those of its elements."""
    import torch

    if not whole:
        return dense_bytes(tensor)
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((elements,), (1,), 0).view(torch.uint8)  # by views alone, which every device has


def _differ(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor | bool:
    """Tell whether bytes differ, without waiting for a device: to wait would hide its races."""
    import torch

    if now.shape != then.shape:
        return True
    return not torch.equal(now, then) if now.device.type == "cpu" else now.ne(then).any()


def _copy(tensor: torch.Tensor, whole: bool) -> torch.Tensor:
    copied = _bytes(tensor, whole)
    return copied.clone() if whole else copied
