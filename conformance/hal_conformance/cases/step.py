# SPDX-License-Identifier: Apache-2.0
"""A training step of a whole model, exact at every stage: what trajectories are explained by.

The model (hal_conformance.language) takes two steps on the device, and everything between its stages is seen: values
and gradients. Each stage is judged from the device's own inputs to it, so that every error is local and the first
stage that leaves its bound is named; what connects the stages (residuals, copies) is judged bit by bit. After two
green steps, a loss that runs elsewhere is rounding that the model amplifies, and nothing else.

Legend: T tokens, D model dim, V vocabulary, P joint projection, Q attention output, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, I64, Arrays, Params
from hal_conformance.cases.base import wide
from hal_conformance.cases.optimizer import best
from hal_conformance.cases.parameters import distinct
from hal_conformance.cases.stages import Stages
from hal_conformance.cases.trajectory import Trajectory
from hal_conformance.language import parameters as named
from hal_conformance.language import spec as specs
from hal_conformance.language.model import rotary_table
from hal_conformance.language.spec import LanguageSpec
from hal_conformance.language.text import VOCABULARY, batch
from hal_conformance.language.training import LIMIT, Recipe
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import Finding, exact, judge, merge, structure
from hal_conformance.oracle import adam
from hal_conformance.oracle.clipping import clip_grad_norm
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

STEPS = 2
_LENGTH = {"tiny": 9, "small": 9, "full": 129}
WIDTH, HIDDEN, EXPERTS, CHOICES = 16, 8, 16, 4
SHOWN = 64
"""Elements of each parameter whose update is seen: what an optimiser does to one element it does to all, and its own
family sees whole tensors."""


def ling() -> LanguageSpec:
    """Return the model with 16 experts of which 4 are chosen: two steps of it are small enough to be recorded."""
    spec = specs.ling(WIDTH, HIDDEN)
    assert spec.experts is not None
    router = replace(spec.experts.router, num_experts=EXPERTS, top_k=CHOICES)
    return replace(spec, experts=replace(spec.experts, router=router), head_width=4)


def llama() -> LanguageSpec:
    """Return its dense control."""
    return replace(specs.llama(WIDTH, HIDDEN), head_width=4)


@dataclass(frozen=True)
class StepExact(Trajectory):
    """Two steps of a model.

    Attributes:
        model: which.
    """

    model: LanguageSpec

    def recipe(self, p: Params) -> Recipe:
        """Return the recipe; without a warm-up, so that the first step moves."""
        return Recipe(sequences=2, length=_LENGTH[p.scale], lr=2.0**-7, warmup=1)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the parameters, and the text of both steps."""
        recipe = self.recipe(p)
        arrays = {f"p/{name}": array for name, array in named.initial(self.model, p.seed).items()}
        for step in range(1, STEPS + 1):
            tokens, targets = batch(p.seed, step, recipe.sequences, recipe.length)
            arrays |= {f"{step}/tokens_BL": tokens, f"{step}/targets_BL": targets}
        table = rotary_table(recipe.length, self.model.head_width, self.model.theta)
        return {**arrays, "cos_LR": table[0], "sin_LR": table[1]}

    def shown(self, p: Params) -> dict[str, I64]:
        """Return, for each parameter, the places of the elements whose update is seen."""
        return {
            name: np.sort(make.permutation(p.seed, f"step/{name}", math.prod(shape))[:SHOWN])
            for name, shape in named.shapes(self.model).items()
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        from hal_conformance.language.training import Training

        start = {name.removeprefix("p/"): t for name, t in tensors.items() if name.startswith("p/")}
        table = tensors["cos_LR"], tensors["sin_LR"]
        training = Training(ops, self.model, start, table, self.recipe(p), getattr(torch, p.dtype))
        found: dict[str, torch.Tensor] = {}
        shown = {name: torch.from_numpy(places).to(table[0].device) for name, places in self.shown(p).items()}
        for step in range(1, STEPS + 1):
            seen: dict[str, torch.Tensor] = {}

            def tap(name: str, tensor: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> torch.Tensor:
                if tensor.requires_grad:
                    tensor.retain_grad()
                seen[name] = tensor
                return tensor

            done = training.gradients(tensors[f"{step}/tokens_BL"], tensors[f"{step}/targets_BL"], tap)
            found |= {f"{step}/{name}": t.detach().clone() for name, t in seen.items()}
            found |= {
                f"{step}/d:{n}": t.grad.clone() for n, t in seen.items() if t.requires_grad and t.grad is not None
            }
            found[f"{step}/norm"] = done.norm
            training.update(done)
            for kind, arrays in (("raw", done.raw), ("whole", training.parameters)):
                if kind == "raw" or step < STEPS:
                    found |= {f"{step}/{kind}/{n}": t.clone() for n, t in zip(training.names, arrays, strict=True)}
            seen_of = {"clipped": done.clipped, "p": training.parameters, "m": training.first, "v": training.second}
            for kind, arrays in seen_of.items():
                for name, array in zip(training.names, arrays, strict=True):
                    found[f"{step}/{kind}/{name}"] = array.reshape(-1)[shown[name]]
        judged = expected_structure(self.model, self.recipe(p), p.dtype)
        return {name: tensor for name, tensor in found.items() if name in judged}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, expected_structure(self.model, self.recipe(p), p.dtype))
        if wrong is not None:
            return wrong
        found: list[Finding] = []
        shown = self.shown(p)
        whole = {name.removeprefix("p/"): array for name, array in inputs.items() if name.startswith("p/")}
        state = {"p": _taken(whole, shown), "m": np.zeros(_count(shown)), "v": np.zeros(_count(shown))}
        for step in range(1, STEPS + 1):
            lead = f"{step}/"
            got = {name.removeprefix(lead): array for name, array in outputs.items() if name.startswith(lead)}
            given = {**whole, **inputs, **{n.removeprefix(lead): a for n, a in inputs.items() if n.startswith(lead)}}
            stages = Stages(self.model, given, got, p, contract).findings()
            norm, clipped = clip_grad_norm([wide(got[f"raw/{name}"]) for name in shown], LIMIT, "float32")
            stages.append(judge("norm of the gradients", got["norm"], norm))
            stages += self._update(step, state, got, clipped, shown, p)
            found += [replace(f, detail=f"step {step}, {f.detail}" if f.detail else "") for f in stages]
            if step < STEPS:
                found += self._whole(whole, got, dict(zip(shown, clipped, strict=True)), p)
                whole = {name: got[f"whole/{name}"] for name in shown}
                found.append(exact("parameters that are seen", _joined(got, "p", shown), _taken(whole, shown)))
            state = {kind: _joined(got, kind, shown) for kind in "pmv"}
        return merge(found)

    def _update(
        self,
        step: int,
        before: dict[str, F64],
        got: Arrays,
        clipped: Sequence[Bounded],
        shown: dict[str, I64],
        p: Params,
    ) -> list[Finding]:
        """Judge clipping and AdamW from the device's own gradients and state."""
        hyper = self.recipe(p).hyper(step)
        found = []
        for (name, places), whole in zip(shown.items(), clipped, strict=True):
            bounded = Bounded(*(np.broadcast_to(a, whole.value.shape).reshape(-1)[places]
                                for a in (whole.value, whole.bound, whole.var)))  # fmt: skip
            free = distinct(np.frexp(np.abs(wide(got[f"raw/{name}"]).reshape(-1)[places]))[0])
            found.append(judge(f"clipped gradient of {name}", got[f"clipped/{name}"], bounded, independent=free))
        g = Bounded.exact(_joined(got, "clipped", shown))
        was = {kind: Bounded.exact(array) for kind, array in before.items()}
        now = {kind: np.concatenate([got[f"{kind}/{name}"] for name in shown]) for kind in "pmv"}
        free_of = {"p": distinct(was["p"].value), "m": distinct(g.value), "v": distinct(g.value)}

        def judged(kind: str, what: str, expected: Bounded) -> list[Finding]:
            return [judge(what, now[kind], expected, independent=free_of[kind])]

        moments: tuple[tuple[str, str, Callable[..., Bounded]], ...] = (
            ("m", "first moments", adam.first_moment), ("v", "second moments", adam.second_moment),
        )  # fmt: skip
        for at, (kind, what, moment) in enumerate(moments):
            readings = sorted({reading.betas(hyper)[at] for reading in adam.READINGS})
            found += best(judged(kind, what, moment(was[kind], g, beta)) for beta in readings)
        m, v = (adam.unstored(wide(now[kind])) for kind in "mv")
        found += best(
            judged(
                "p", "parameters",
                adam.parameter(was["p"], m, v, step, hyper, "float32", decoupled=True, single=single),
            )
            for single in (False, True)
        )  # fmt: skip
        return found

    def _whole(self, before: Arrays, got: Arrays, clipped: dict[str, Bounded], p: Params) -> list[Finding]:
        """Judge all parameters after the first step, chained from the device's own gradients."""
        hyper = self.recipe(p).hyper(1)
        found = []
        for name, g in clipped.items():
            zero, was = Bounded.exact(np.zeros(g.value.shape)), Bounded.exact(wide(before[name]))

            def under(reading: adam.Reading, was: Bounded = was, g: Bounded = g, zero: Bounded = zero) -> Bounded:
                beta1, beta2 = reading.betas(hyper)
                m, v = adam.first_moment(zero, g, beta1), adam.second_moment(zero, g, beta2)
                single = reading.single_corrections
                return adam.parameter(was, m, v, 1, hyper, "float32", decoupled=True, single=single)

            # The first step is one size for everyone: an error depends on the value that it is taken from.
            free, array = distinct(was.value), got[f"whole/{name}"]
            found += best([judge(f"whole {name}", array, under(r), independent=free)] for r in adam.READINGS)
        return found


def _count(shown: dict[str, I64]) -> int:
    return sum(map(len, shown.values()))


def _taken(whole: Arrays, shown: dict[str, I64]) -> F64:
    """Return the elements that are seen, of whole parameters."""
    return np.concatenate([wide(whole[name]).reshape(-1)[places] for name, places in shown.items()])


def _joined(got: Arrays, kind: str, shown: dict[str, I64]) -> F64:
    """Return the elements that are seen, as the device returned them."""
    return np.concatenate([wide(got[f"{kind}/{name}"]) for name in shown])


def expected_structure(spec: LanguageSpec, recipe: Recipe, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of everything that two steps show."""
    b, length = recipe.sequences, recipe.length
    t, d = b * length, spec.width
    h, g, w = spec.heads, spec.key_heads, spec.head_width
    inside: dict[str, tuple[tuple[int, ...], str]] = {}

    def both(shape: tuple[int, ...], *names: str, kind: str = dtype) -> None:
        for name in names:
            inside[name] = inside[f"d:{name}"] = (shape, kind)

    both((t, d), "x", "normed")
    both((t, VOCABULARY), "logits")
    for layer in range(spec.layers):

        def at(name: str, layer: int = layer) -> str:
            return named.of(layer, name)

        both((t, d), *map(at, ("attention_in", "attention_normed", "attention_out", "h")))
        both((t, d), *map(at, ("mlp_in", "mlp_normed", "mlp", "out")))
        both((t, spec.projected), at("qkv"))
        both((t, h * w), at("attention"))
        for n in range(b):
            both((length, h, w), at(f"q{n}"), at(f"rq{n}"), at(f"a{n}"))
            both((length, g, w), at(f"k{n}"), at(f"rk{n}"))
            both((length, g, w), at(f"v{n}"))
        if spec.experts is not None:
            e, k = spec.experts.router.num_experts, spec.experts.router.top_k
            inside |= {
                at("logits_TE"): ((t, e), dtype), at("scores_TE"): ((t, e), "float32"),
                at("experts_TK"): ((t, k), "int64"), at("weights_TK"): ((t, k), "float32"),
                at("aux_loss"): ((), "float32"), at("z_loss"): ((), "float32"),
            }  # fmt: skip
    inside |= dict.fromkeys(("entropy", "total", "norm"), ((), "float32"))
    whole: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in named.shapes(spec).items():
        inside[f"raw/{name}"] = whole[f"whole/{name}"] = (shape, "float32")
        for kind in ("clipped", "p", "m", "v"):
            inside[f"{kind}/{name}"] = ((min(SHOWN, math.prod(shape)),), "float32")
    found = {f"{step}/{name}": what for step in range(1, STEPS + 1) for name, what in inside.items()}
    return found | {f"{step}/{name}": what for step in range(1, STEPS) for name, what in whole.items()}


_WHAT = (
    "Two training steps of a small {0} over real text: forward, backward, clipping, AdamW. Each stage is judged from "
    "the device's own inputs to it, with the bounds of its own family, and what connects the stages bit by bit; the "
    "detail names the first stage that left its bound. Operators that an implementation lacks are the portable ones."
)
CASES = (
    StepExact(
        "trajectory.step_ling", "trajectory", ("layer",), _WHAT.format("model in the shape of Ling-Lite"), ling()
    ),
    StepExact(
        "trajectory.step_llama", "trajectory", ("experts",), _WHAT.format("dense model in the shape of Llama"), llama()
    ),
)  # fmt: skip
