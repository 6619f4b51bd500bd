# SPDX-License-Identifier: Apache-2.0
"""How far devices drift apart in training: one model, one start, one text, 200 steps on each; losses and a plot.

Besides the devices an honest twin of the first runs along (`hal_conformance.language.twins`): the same equations from
parameters an ulp apart, in another order. What sets it apart is rounding alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harness import machine

import hal
from hal_conformance.language import curves
from hal_conformance.language.training import begin, run
from hal_conformance.language.twins import operators, twin
from hal_conformance.portable import portable

STEPS, SEED, DTYPE = 200, 0, torch.bfloat16
DEVICES = ("cpu", "sim:h200", "sim:mi300x")
TWIN = "cpu, an honest twin"
RESULTS = Path(__file__).parent / "results"


def losses(device: str, number: int | None = None) -> tuple[list[float], torch.Tensor]:
    """Return the cross-entropy of each step, and all parameters after the first; of a twin with a number."""
    spec = curves.model("ling")
    start = curves.start(spec, SEED)
    if number is not None:
        start = twin(start, spec, number)
    with hal.open_device(device) as opened:
        placed = {name: torch.from_numpy(array).to(opened.torch_device) for name, array in start.items()}
        training = begin(portable if number is None else operators(number), spec, placed, curves.RECIPE, DTYPE)
        found, first = [], torch.empty(0)
        for done in run(training, curves.RECIPE, SEED, STEPS):
            found.append(float(done.losses.entropy.detach()))
            if training.step == 0:
                first = torch.cat([gradient.flatten() for gradient in done.raw])
        return found, first


def apart(ours: Sequence[float], theirs: Sequence[float], limit: float) -> int | None:
    """Return the first step, from 1, at which two curves are further apart than `limit`."""
    return next((step for step, pair in enumerate(zip(ours, theirs, strict=True), 1)
                 if abs(pair[0] - pair[1]) > limit), None)  # fmt: skip


def smoothed(curve: Sequence[float], width: int = 10) -> list[float]:
    """Return the mean of the last `width` steps at each."""
    return [sum(curve[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(curve))]


COLOURS = ("#1b6ca8", "#7f7f7f", "#c1440e", "#3a7d44")


def plot(found: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG: above the losses, below how far each is from the first, on a logarithmic scale."""
    width, height, left = 720, 260, 60  # pixels
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * height + 40}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{2 * height + 40}" fill="white"/>',
    ]

    def axes(top: int, title: str, marks: Sequence[tuple[float, str]]) -> None:
        parts.append(f'<text x="{left}" y="{top + 14}" font-weight="bold">{title}</text>')
        for y, text in marks:
            parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        parts.extend(
            f'<text x="{x(step):.1f}" y="{top + height}" text-anchor="middle">{step}</text>'
            for step in range(0, STEPS + 1, 50)
        )

    def x(step: float) -> float:
        return left + (width - left - 20) * step / STEPS

    def line(values: Sequence[float], colour: str) -> None:
        points = " ".join(f"{x(i + 1):.1f},{y:.1f}" for i, y in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"/>')

    low, high = 2.0, 5.0

    def of_loss(value: float) -> float:
        return 30 + (height - 50) * (high - value) / (high - low)

    def of_difference(power: float) -> float:
        return height + 50 + (height - 50) * (0.0 - max(-7.0, min(0.0, power))) / 7.0

    axes(0, "cross-entropy, mean of 10 steps", [(of_loss(v), f"{v:.1f}") for v in (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)])
    axes(
        height + 20,
        "difference from cpu, step by step",
        [(of_difference(-p), f"1e-{p}" if p < 7 else "none") for p in range(8)],
    )
    names = list(found)
    for name, colour in zip(names, COLOURS, strict=False):
        line([of_loss(v) for v in smoothed(found[name])], colour)
        number = names.index(name)
        parts.append(f'<text x="{width - 190}" y="{50 + 18 * number}" fill="{colour}">{name}</text>')
        if number:
            gaps = [abs(a - b) for a, b in zip(found[name], found[names[0]], strict=True)]
            line([of_difference(torch.tensor(max(gap, 1e-7)).log10().item()) for gap in gaps], colour)
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Train on all, and write JSON and the plot under `results/`."""
    found: dict[str, list[float]] = {}
    gradients: dict[str, torch.Tensor] = {}
    for name in (DEVICES[0], TWIN, *DEVICES[1:]):
        found[name], gradients[name] = losses("cpu", 0) if name == TWIN else losses(name)
        sys.stderr.write(f"{name}: {found[name][0]:.4f} to {sum(found[name][-20:]) / 20:.4f}\n")
    rows = []
    for name, curve in found.items():
        row: dict[str, object] = {
            "name": name, "first": curve[0], "last_20": sum(curve[-20:]) / 20,
            "first_difference": apart(curve, found[DEVICES[0]], 0.0),
            "apart_by_0.01": apart(curve, found[DEVICES[0]], 0.01),
            "largest_difference": max(abs(a - b) for a, b in zip(curve, found[DEVICES[0]], strict=True)),
            "losses": curve,
        }  # fmt: skip
        if name in DEVICES:  # a twin's gradients are in another order
            changed = gradients[name] != gradients[DEVICES[0]]
            row["first_gradients_that_differ"] = float(changed.double().mean())
        rows.append(row)
    report = {"schema": "hal.benchmark/1", "name": "devices_apart", "machine": machine(), "steps": STEPS, "rows": rows}
    (RESULTS / "devices_apart.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "devices_apart.svg").write_text(plot(found))
    for row in rows:
        sys.stdout.write(f"{ {k: v for k, v in row.items() if k != 'losses'} }\n")


if __name__ == "__main__":
    main()
