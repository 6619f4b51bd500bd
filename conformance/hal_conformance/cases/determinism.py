# SPDX-License-Identifier: Apache-2.0
"""The same call again: after a warm-up, on memory that is not clean, and in another batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.arrays import bits
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases import (
    attention,
    combine,
    dispatch,
    experts,
    gradients,
    head,
    layer,
    losses,
    norm,
    router_backward,
)
from hal_conformance.cases.sized import FEW_EXPERTS
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch

RUNS = 3
LAYERS = ("mixtral-8x7b", "qwen2-moe")


def soil(tensors: dict[str, torch.Tensor]) -> None:
    """Leave NaN in the memory that an allocator hands out next: padding that is read shows, as in MSLK PR#158."""
    import torch

    dirt = [torch.full_like(t, torch.nan) for t in tensors.values() if t.is_floating_point() for _ in range(2)]
    del dirt


class Again(Wrapped):
    """A case, three times: a layer, and operators alone, since in a fused layer others may run."""

    @property
    def family(self) -> str:
        """See `Case.family`."""
        return "determinism"

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, three times, NaN left in freed memory between them; other bits within the bounds "
            f"are NONDET. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        once = super().footprint(p)
        return Footprint(once.inputs, RUNS * once.outputs)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        found: dict[str, torch.Tensor] = {}
        for number in range(RUNS):
            once = self.inner.run(ops, tensors, p)
            found |= {f"{name}/{number}": tensor for name, tensor in once.items()}
            soil({**tensors, **once})
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: each run within its bounds, and all of them with the same bits."""
        return judge_runs(outputs, lambda run: self.inner.judge(inputs, run, p, contract))


def judge_runs(outputs: Arrays, once: Callable[[Arrays], Judgement]) -> Judgement:
    """Judge `RUNS` runs: each by `once`, and NONDET if the bits of one are not the first's."""
    first, *others = (part(outputs, number) for number in range(RUNS))
    verdict = once(first)
    if verdict.status.colour != "green":
        return verdict
    for number, run in enumerate(others, 2):
        shares = {name: differs(first[name], array) for name, array in run.items() if name in first}
        if run.keys() == first.keys() and not any(shares.values()):
            continue
        again = once(run)
        if again.status.colour != "green":
            return Judgement(again.status, again.margin, again.detectors, f"run {number}: {again.detail}")
        changed = ", ".join(f"{share:.2g} of {name}" for name, share in shares.items() if share)
        detail = f"run {number} has other bits than the first, each within its bounds: {changed}"
        return Judgement(Status.NONDET, again.margin, again.detectors, detail)
    return verdict


class Halves(layer.Layer):
    """A layer on a whole batch, and on each half of it."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        batches = (tensors, *halves(tensors, len(tensors["x_TD"])))
        found: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches):
            found |= {f"{name}/{number}": tensor for name, tensor in super().run(ops, batch, p).items()}
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: all within their bounds; EXACT if each half has the bits that it has in the whole."""
        tokens = len(inputs["x_TD"])
        whole = part(outputs, 0)
        verdict = super().judge(inputs, whole, p, contract)
        if verdict.status.colour != "green":
            return verdict
        shares, found = [], [verdict]
        for number, batch in enumerate(halves(inputs, tokens), 1):
            alone = super().judge(batch, part(outputs, number), p, contract)
            if alone.status.colour != "green":
                detail = f"{('first', 'second')[number - 1]} half of the tokens: {alone.detail}"
                return Judgement(alone.status, alone.margin, alone.detectors, detail)
            found.append(alone)
            place = (slice(tokens // 2), slice(tokens - tokens // 2, None))[number - 1]
            shares.append(differs(whole["y_TD"][place], part(outputs, number)["y_TD"]))
        if not any(shares):
            return Judgement(Status.EXACT, verdict.margin, verdict.detectors)
        worst = max(found, key=lambda one: one.status.severity)
        detail = f"{max(shares):.2g} of y has other bits in half of the batch"
        return Judgement(worst.status, worst.margin, worst.detectors, detail)


def part(outputs: Arrays, number: int) -> Arrays:
    """Return the outputs of one run, under their own names."""
    ending = f"/{number}"
    return {name.removesuffix(ending): array for name, array in outputs.items() if name.endswith(ending)}


def halves(arrays: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Return the arrays of the first and the last half of the tokens, as many each, with the weights."""
    by_token, half = ("x_TD", "experts_TK"), tokens // 2
    return [
        {name: array[part] if name in by_token else array for name, array in arrays.items()}
        for part in (slice(half), slice(tokens - half, None))
    ]


def differs(a: Any, b: Any) -> float:
    """Return the share of elements that differ in a bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return 1.0
    return float((bits(a) != bits(b)).mean()) if a.size else 0.0


CASES = (
    Again("determinism.repeated", layer.BACKWARD, only=LAYERS),
    Halves(
        "determinism.batch", "determinism", ("layer",),
        "A layer on a batch, on its first and on its last half; the results are read after the last call, so that one "
        "that a later call of the same shape overwrites shows, and counts that were kept. All are judged as ever, and "
        "EXACT says that a token's result has the same bits whoever its batchmates are (vllm#57016).",
        replayed=True, only=LAYERS,
    ),
    Again("determinism.route", router_backward.BACKWARD),
    Again("determinism.dispatch_backward", dispatch.BACKWARD),
    Again("determinism.combine", combine.RANDOM),
    Again("determinism.combine_backward", combine.BACKWARD),
    Again("determinism.experts", experts.BACKWARD, only=FEW_EXPERTS),
    Again("determinism.aux_loss", losses.AUX),
    Again("determinism.z_loss", losses.Z_LOSS),
    Again("determinism.attention", attention.CAUSAL),
    Again("determinism.rms_norm", norm.RMS),
    Again("determinism.layer_norm", norm.LAYER),
    Again("determinism.cross_entropy", head.ENTROPY),
    Again("determinism.clip", gradients.CLIP),
)  # fmt: skip
