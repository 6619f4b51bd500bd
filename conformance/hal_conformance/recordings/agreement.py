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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from hal_conformance import arrays as codec
from hal_conformance.case import Array, Arrays, Params, Unpromised
from hal_conformance.numerics import absent
from hal_conformance.recordings import sampling
from hal_conformance.report.pair import Elements, Pair, Parting
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.execution.plan import Task
    from hal_conformance.numerics.margins import Certainty
    from hal_conformance.recordings.packed import Packed
    from hal_conformance.result import Result

MOST = 14
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
        exact = result.margin is None and result.status.colour == "green"
        if not exact or isinstance(task.case, Chooses):
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

    def by(self, subject: int, tokens: int) -> Array:
        """Return, for each token, whether it has one right set of experts; [T]. Without a promise, none has."""
        if subject not in self._of:
            case, p = self._task.case, self._task.params
            assert isinstance(case, Chooses)
            try:
                with np.errstate(all="ignore"):
                    found = case.choice(case.inputs(p), p, self._contracts[subject])
                self._of[subject] = np.asarray(~(found.may & ~found.must).any(1))
            except Unpromised:
                self._of[subject] = np.zeros(tokens, bool)
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
                pair.tokens.certain += int(
                    (rerouted & certain.by(who[0], len(rerouted)) & certain.by(who[1], len(rerouted))).sum()
                )
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
