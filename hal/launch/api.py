# SPDX-License-Identifier: Apache-2.0
"""The table of redirected APIs: one entry for each name that a program may use, and how it is answered.

The table is filled by the decorators here when `hal.launch.surface` is imported, which needs no torch: the runner, the
static scan and the table in the documentation read the same entries.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hal.launch.named import give_name

if TYPE_CHECKING:
    from hal.launch.redirection import Redirection

Verdict = Literal["native", "emulated", "refused"]
"""native: the device does it. emulated: something of equal meaning is done. refused: a clear error says why not."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Api:
    """One name of torch that is answered for the device.

    Attributes:
        name: as the program writes it: `torch.cuda.synchronize`.
        verdict: what happens on a device whose torch module has nothing of the kind, such as the CPU.
        forwards: whether the function of the same name in the device's own torch module is called where there is one;
            there the verdict is native.
        belief: whether programs choose branches by the answer.
        answer: called with the redirection and the program's arguments; or, for `makes`, with the redirection alone.
        makes: whether `answer` makes the object that stands under the name, instead of being called in its place.
        note: what a user should know.
        each: whether, of `makes`, the object is made anew each time that the name is read.
    """

    name: str
    verdict: Verdict
    answer: Callable[..., Any]
    forwards: bool = False
    belief: bool = False
    makes: bool = False
    note: str = ""
    each: bool = False

    @property
    def module(self) -> str:
        """The module in which the name is looked up."""
        return self.name.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """The name inside of its module."""
        return self.name.rpartition(".")[2]


TABLE: dict[str, Api] = {}


@dataclass(frozen=True)
class Door:
    """A name that stays torch's own, and of which what it is given or answers is translated.

    Attributes:
        name: as the program writes it: `torch.autocast`, `torch.Tensor.to`.
        verdict: as in `Api`.
        note: what a user should know.
    """

    name: str
    verdict: Verdict
    note: str = ""


DOORS: dict[str, Door] = {}


def door(*names: str, verdict: Verdict = "native", note: str = "") -> None:
    """Enter names whose arguments or answers are translated where they are defined."""
    for name in names:
        DOORS[name] = Door(name, verdict, note)


def api(
    *names: str, verdict: Verdict = "native", forwards: bool = False, belief: bool = False, note: str = ""
) -> Callable[[F], F]:
    """Enter the function below as the answer to calls of these names."""

    def enter(function: F) -> F:
        for name in names:
            _enter(Api(name, verdict, function, forwards, belief, False, note))
        return function

    return enter


def value(
    *names: str, verdict: Verdict = "native", belief: bool = False, note: str = "", each: bool = False
) -> Callable[[F], F]:
    """Enter the function below as the maker of what stands under these names: a class, a number, a text.

    With `each` it is asked each time that a name is read.
    """

    def enter(function: F) -> F:
        for name in names:
            _enter(Api(name, verdict, function, False, belief, True, note, each))
        return function

    return enter


def refused(*names: str, why: str, hint: str = "") -> None:
    """Enter functions that no device but CUDA has; calling one is an error that says why."""
    for name in names:

        def answer(redirection: Redirection, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            raise redirection.refuse(_name, why, hint)

        _enter(Api(name, "refused", answer, forwards=True, note=why))


def _enter(entry: Api) -> None:
    if entry.name in TABLE:
        raise ValueError(f"{entry.name} is entered twice")
    TABLE[entry.name] = entry


# The one redirection of this process ---------------------------------------------------------------------------------

_active: Redirection | None = None


def active() -> Redirection | None:
    """Return the redirection in force, or None."""
    return _active


def activate(redirection: Redirection | None) -> None:
    """Put a redirection in force; None ends it, and every wrapper calls its original again."""
    global _active
    _active = redirection


def count_made(name: str, belief: bool = False) -> None:
    """Count what the program made of a class that stands in for one of torch's: the caller's caller, unless it is ours.

    Args:
        name: of the class, as the program writes it.
        belief: whether it asked whether something is one of these.
    """
    from torch.compiler import is_dynamo_compiling

    if _active is not None and not is_dynamo_compiling():  # the compiler traces through here, and knows no frames
        _active.audit.count_outside(name, sys._getframe(2), belief)


def wrapped(entry: Api, original: Callable[..., Any] | None, redirection: Redirection) -> Callable[..., Any]:
    """Return the function that stands in for `original`.

    It counts the call under the caller's line, and answers. Kept beyond the release, it calls the original.
    """
    from torch.compiler import is_dynamo_compiling

    answer, name, belief = entry.answer, entry.name, entry.belief
    if entry.forwards and redirection.hosts is None:
        own = getattr(redirection.module, entry.attribute, None)
        if callable(own):
            answer = _forwarded(own)

    def call(*args: Any, **kwargs: Any) -> Any:
        redirection = _active
        if redirection is None:
            if original is None:
                raise AttributeError(f"this torch has no {name}")
            return original(*args, **kwargs)
        if not is_dynamo_compiling():  # the compiler traces through here, and knows no frames
            redirection.audit.count(name, sys._getframe(1), belief)
        return answer(redirection, *args, **kwargs)

    # No __wrapped__: the compiler and `inspect` would look through to the original.
    functools.update_wrapper(call, original or answer, updated=())
    del call.__wrapped__  # type: ignore[attr-defined]
    give_name(call, name)
    return call


def _forwarded(own: Callable[..., Any]) -> Callable[..., Any]:
    def answer(redirection: Redirection, *args: Any, **kwargs: Any) -> Any:
        return own(
            *(redirection.translate(argument) if not isinstance(argument, int) else argument for argument in args),
            **{key: redirection.translate(argument) if key == "device" else argument
               for key, argument in kwargs.items()},
        )  # fmt: skip

    return answer
