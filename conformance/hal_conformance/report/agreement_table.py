# SPDX-License-Identifier: Apache-2.0
"""The agreement of devices for people: who differs from whom by how much, and what it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from hal_conformance.text import plain

if TYPE_CHECKING:
    from rich.console import Console

    from hal_conformance.report.pair import Pair, Parting

NAME = 20
"""Characters of a name in the matrix; they are whole in the lines below."""
WIDTH, CELL = 100, 6
"""Columns of the terminal, and of a cell of the matrix."""
CPU = "cpu"


def show(pairs: Sequence[Pair], out: Console) -> None:
    """Print a matrix of all devices, and lines on one of them, the CPU if it is among them, and each other one."""
    labels = names(pairs)
    if not any(pair.all_elements.compared or pair.tokens.compared or pair.partings for pair in pairs):
        return
    out.print(Text("agreement: below, elements that differ; above, tokens with other experts", "bold"))
    widest = max(len(_short(label)) for label in labels) + 4
    if widest + CELL * len(labels) > WIDTH:
        out.print(Text(f"{len(labels)} devices are too many for a matrix; --json has every pair", "dim"))
    else:
        _matrix(pairs, labels, out)
    reference = CPU if CPU in labels else labels[0]
    for pair in pairs:
        if reference in (pair.a, pair.b):
            for line in sentences(pair):
                out.print(Text(line, style="dim" if line.startswith(" ") else ""))


def _matrix(pairs: Sequence[Pair], labels: Sequence[str], out: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for number in range(1, len(labels) + 1):
        table.add_column(str(number), justify="right", no_wrap=True, min_width=CELL - 1)
    of = {(pair.a, pair.b): pair for pair in pairs}
    for i, row in enumerate(labels):
        cells = [
            "·" if i == j else _percent(of[column, row].all_elements.share) if j < i else _rerouted(of[row, column])
            for j, column in enumerate(labels)
        ]
        table.add_row(Text(f"{i + 1} {_short(row)}"), *(Text(cell) for cell in cells))
    out.print(table)


def _short(label: str) -> str:
    """Return a name of at most `NAME` characters; those of recordings differ at their ends."""
    whole = plain(label)
    return whole if len(whole) <= NAME else f"{whole[:6]}..{whole[8 - NAME :]}"


def names(pairs: Sequence[Pair]) -> list[str]:
    """Return the labels of all subjects, in their order."""
    return list(dict.fromkeys([*(pair.a for pair in pairs), *(pair.b for pair in pairs)]))


def sentences(pair: Pair) -> Iterator[str]:
    """Yield a heading, and what there is to say of two devices: elements, experts, training."""
    yield f"{plain(pair.b)} against {plain(pair.a)}"
    if pair.elements:
        yield f"    differ: {'; '.join(differing(pair))}"
    tokens = pair.tokens
    if tokens.compared:
        yield f"    other experts: {rerouted(pair)}"
    for parting in pair.partings:
        yield f"    {plain(parting.case)} {parting.dtype}: {parted(parting)}"


def differing(pair: Pair) -> Iterator[str]:
    """Yield the share of elements that differ, and of these the share that is smaller on the second, by dtype."""
    for dtype, found in pair.elements.items():
        smaller = "" if found.bias is None else f" ({50 * (1 - found.bias):.0f}% smaller)"
        yield f"{dtype} {_percent(found.share)}{smaller}"


def rerouted(pair: Pair) -> str:
    """Return how many tokens have other experts, and whether both choices are right."""
    tokens = pair.tokens
    if not tokens.rerouted:
        return f"none of {tokens.compared:,} tokens"
    right = tokens.rerouted - tokens.certain
    parts = [f"{right} open by the bounds"] if right else []
    if tokens.certain:
        parts.append(f"{tokens.certain} certain: one device is WRONG")
    return f"{tokens.rerouted} of {tokens.compared:,} tokens: {', '.join(parts)}"


def parted(parting: Parting) -> str:
    """Return where two training runs part, and how far."""
    if parting.first is None:
        return f"the same losses in all {parting.steps} steps"
    far = "not finite in one of them" if parting.largest is None else f"apart by at most {parting.largest:.2g}"
    return f"losses differ from step {parting.first} of {parting.steps}, {far}"


def _rerouted(pair: Pair) -> str:
    return "" if not pair.tokens.compared else str(pair.tokens.rerouted) + ("!" if pair.tokens.certain else "")


def _percent(share: float | None) -> str:
    """Return a share in percent with two digits; never 0 of what is not, and nothing of nothing."""
    if share is None:
        return ""
    if not share or share >= 0.1:
        return f"{share:.0%}"
    if share < 1e-4:
        return "<.01%"
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def rows(pairs: Sequence[Pair]) -> Iterator[tuple[str, ...]]:
    """Yield a row of a table for each pair: both names, elements that differ, tokens, training."""
    for pair in pairs:
        training = "; ".join(f"{p.case} {p.dtype}: {parted(p)}" for p in pair.partings)
        yield pair.a, pair.b, "; ".join(differing(pair)), rerouted(pair) if pair.tokens.compared else "", training
