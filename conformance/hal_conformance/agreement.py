# SPDX-License-Identifier: Apache-2.0
"""How far devices are from each other, pair by pair: what a run on a mixture of them has to live with.

Each device is judged against the oracle; all may be right, and no two the same. Counted here are elements that differ
in a bit, in which direction, tokens that go to other experts, and what becomes of a short training run. Nothing of it
is a verdict: two devices that are within their bounds may differ wherever their bounds allow it. Cases that are exact
by design, on every device, are left out, and so are zeros that both devices have: they say nothing.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from hal_conformance import absent, sampling
from hal_conformance import arrays as codec
from hal_conformance.case import Array, Arrays, Params
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.margins import Certainty
    from hal_conformance.packed import Packed
    from hal_conformance.plan import Task
    from hal_conformance.results import Result

MOST = 12
"""Subjects whose pairs are shown together: as many as fit beside each other."""
EXPERTS, LOSS = "experts_TK", "entropy"
"""Outputs that say which experts a token has, and what the loss of each step is."""


_OF_OTHER_SHAPES = frozenset({Status.FAIL_STRUCTURE, Status.INVALID})


@runtime_checkable
class Chooses(Protocol):
    """A case in which a device routes by itself; it says what is certain of the choice before any device has run."""

    def choice(self, inputs: Arrays, p: Params, contract: Contract) -> Certainty:
        """Return what is certain of each token's experts, from the inputs and the contract alone."""
        ...


@dataclass(frozen=True)
class Held:
    """The elements of an output that are compared: the same ones of every device.

    Attributes:
        tag: dtype.
        shape: of the whole output.
        values: of the elements; one axis.
    """

    tag: str
    shape: tuple[int, ...]
    values: Array

    @classmethod
    def of(cls, name: str, array: Array, seed: int) -> Held:
        """Return what is held of a whole output."""
        grid = sampling.grid(name, array.shape, seed) if absent.can_be_absent(array.dtype) else None
        flat = array.reshape(-1)
        return cls(codec.tag_of(array), array.shape, flat.copy() if grid is None else flat[grid.indices])

    @classmethod
    def of_packed(cls, packed: Packed) -> Held:
        """Return what is held of an output of a recording."""
        return cls(packed.tag, packed.shape, packed.held()[1])


@dataclass
class Elements:
    """Elements of one dtype.

    Attributes:
        compared: how many; not those that are zero on both.
        differing: of these, in a bit; a NaN is equal to any other.
        smaller, larger: of the differing ones, those whose magnitude is smaller, or larger, on the second device.
    """

    compared: int = 0
    differing: int = 0
    smaller: int = 0
    larger: int = 0

    @property
    def share(self) -> float:
        """The share of elements that differ."""
        return self.differing / max(1, self.compared)

    @property
    def bias(self) -> float | None:
        """From -1, where what differs is always smaller on the second device, to 1; 0 where neither is favoured."""
        moved = self.smaller + self.larger
        return (self.larger - self.smaller) / moved if moved else None

    def __iadd__(self, other: Elements) -> Elements:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)
        return self

    def add(self, one: Array, other: Array) -> None:
        """Count the elements of an output."""
        differing = codec.bits(one) != codec.bits(other)
        a, b = (x[differing].astype(np.float64) for x in (one, other))
        known = ~(np.isnan(a) & np.isnan(b))
        self.compared += int(((one != 0) | (other != 0)).sum())
        self.differing += int(known.sum())
        self.smaller += int((np.abs(b) < np.abs(a)).sum())
        self.larger += int((np.abs(b) > np.abs(a)).sum())


@dataclass
class Tokens:
    """Tokens that both devices routed by themselves.

    Attributes:
        compared: how many.
        rerouted: of these, with another set of experts.
        certain: of the rerouted ones, those that have one right set by both contracts: one of the devices is wrong.
    """

    compared: int = 0
    rerouted: int = 0
    certain: int = 0

    def __iadd__(self, other: Tokens) -> Tokens:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)
        return self


@dataclass(frozen=True)
class Parting:
    """Two training runs from one start.

    Attributes:
        first: the first step whose losses differ, counted from 1; None: none does.
        largest: the largest difference of a step's losses; None: one is not finite.
        steps: of each run.
    """

    case: str
    dtype: str
    first: int | None
    largest: float | None
    steps: int


@dataclass
class Pair:
    """Two subjects.

    Attributes:
        a, b: their labels.
        elements: by the dtype in which they are stored.
    """

    a: str
    b: str
    elements: dict[str, Elements] = field(default_factory=dict)
    tokens: Tokens = field(default_factory=Tokens)
    partings: list[Parting] = field(default_factory=list)

    @property
    def all_elements(self) -> Elements:
        """Those of every dtype together."""
        found = Elements()
        for of_dtype in self.elements.values():
            found += of_dtype
        return found

    def __iadd__(self, other: Pair) -> Pair:
        """Add what was found of the same two subjects in other tasks."""
        for dtype, of_dtype in other.elements.items():
            self.elements.setdefault(dtype, Elements()).__iadd__(of_dtype)
        self.tokens += other.tokens
        self.partings += other.partings
        return self

    def as_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        elements = {dtype: {**vars(e), "bias": e.bias} for dtype, e in self.elements.items()}
        partings = [dict(vars(parting)) for parting in self.partings]
        return {"a": self.a, "b": self.b, "elements": elements, "tokens": dict(vars(self.tokens)), "partings": partings}


class Agreement:
    """Collects what subjects return, and compares it.

    Args:
        labels, contracts: one for each subject.
    """

    def __init__(self, labels: Sequence[str] = (), contracts: Sequence[Contract] = ()) -> None:
        self._labels = list(labels)
        self._contracts = list(contracts)
        self._held: dict[Task, dict[int, dict[str, Held]]] = {}

    def subject(self, label: str, contract: Contract) -> int:
        """Return the number of one more subject."""
        self._labels.append(label)
        self._contracts.append(contract)
        return len(self._labels) - 1

    def add(self, subject: int, task: Task, outputs: Mapping[str, Array], result: Result) -> None:
        """Take in what a subject returned for a task."""
        held = {name: Held.of(name, array, task.params.seed) for name, array in outputs.items()}
        self.hold(subject, task, held, result)

    def hold(self, subject: int, task: Task, outputs: Mapping[str, Held], result: Result) -> None:
        """Take in what is held of it, unless it was judged bit by bit, or is not what the case asks for."""
        if result.status in _OF_OTHER_SHAPES:
            return
        if result.margin is not None or isinstance(task.case, Chooses):
            self._held.setdefault(task, {})[subject] = dict(outputs)

    def pairs(self) -> list[Pair]:
        """Return every pair of subjects, the first ones first."""
        found = {
            (i, j): Pair(self._labels[i], self._labels[j])
            for i, j in itertools.combinations(range(len(self._labels)), 2)
        }
        for task, held in self._held.items():
            certain = _Certain(task, self._contracts)
            for i, j in itertools.combinations(sorted(held), 2):
                _compare(found[i, j], task, held[i], held[j], certain, (i, j))
        return list(found.values())


class _Certain:
    """Which tokens' experts are certain by each contract; worked out only if a token has others."""

    def __init__(self, task: Task, contracts: Sequence[Contract]) -> None:
        self._task = task
        self._contracts = contracts
        self._of: dict[int, Array] = {}

    def by(self, subject: int) -> Array:
        """Return, for each token, whether it has one right set of experts; [T]."""
        if subject not in self._of:
            case, p = self._task.case, self._task.params
            assert isinstance(case, Chooses)
            with np.errstate(all="ignore"):
                found = case.choice(case.inputs(p), p, self._contracts[subject])
            self._of[subject] = np.asarray(~(found.may & ~found.must).any(1))
        return self._of[subject]


def _compare(
    pair: Pair, task: Task, one: Mapping[str, Held], other: Mapping[str, Held], certain: _Certain, who: tuple[int, int]
) -> None:
    for name, a, b in _alike(one, other):
        word = sampling.word(name)
        if task.case.family == "trajectory":
            if word != LOSS or a.values.size < 2:
                continue
            pair.partings.append(_parting(task, a.values.astype(np.float64), b.values.astype(np.float64)))
        elif word == EXPERTS and isinstance(task.case, Chooses):
            sets = [np.sort(h.values.reshape(h.shape), axis=1) for h in (a, b)]
            rerouted = (sets[0] != sets[1]).any(1)
            pair.tokens.compared += len(rerouted)
            if rerouted.any():
                pair.tokens.rerouted += int(rerouted.sum())
                pair.tokens.certain += int((rerouted & certain.by(who[0]) & certain.by(who[1])).sum())
        elif absent.can_be_absent(a.values.dtype):
            pair.elements.setdefault(a.tag, Elements()).add(a.values, b.values)


def _alike(one: Mapping[str, Held], other: Mapping[str, Held]) -> Iterator[tuple[str, Held, Held]]:
    """Yield the outputs of one dtype and shape; others have a verdict of their own."""
    for name, a in one.items():
        b = other.get(name)
        if b is not None and (a.tag, a.shape, a.values.shape) == (b.tag, b.shape, b.values.shape):
            yield name, a, b


def _parting(task: Task, a: Array, b: Array) -> Parting:
    apart = np.flatnonzero(a != b)
    with np.errstate(all="ignore"):
        largest = float(np.abs(a - b).max(initial=0.0))
    return Parting(
        task.case.name, task.params.dtype, int(apart[0]) + 1 if len(apart) else None,
        largest if np.isfinite(largest) else None, len(a),
    )  # fmt: skip
