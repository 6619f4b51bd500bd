# SPDX-License-Identifier: Apache-2.0
"""A layer where every order of summation gives the same result and gradients: judged bit by bit."""

from __future__ import annotations

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Params
from hal_conformance.cases import layer_design
from hal_conformance.cases.base import keeps_nonfinite, model_of, wide
from hal_conformance.cases.designs import ONE
from hal_conformance.cases.frozen import Frozen
from hal_conformance.cases.layer import BACKWARD, CAPACITY, ONE_TOKEN, Layer
from hal_conformance.cases.sized import FEW_EXPERTS
from hal_conformance.cases.strided import Sliced
from hal_conformance.numerics.detectors import ExactMeter, Finding, exact
from hal_conformance.oracle.dispatching import gather_rows, sent, spans
from hal_conformance.oracle.layer import ROUTED, SHARED


class Integers(Layer):
    """Integers: what is stored is exact, but for the last addition of each of y and dx, which is rounded once."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        return {**arrays, **layer_design.integers(arrays, model_of(p).router.top_k, p)}

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Layer.findings`: as ever, and bit by bit if the weights are what they are meant to be.

        They are equal scores of zero logits, powers of two. A device whose exp or division is an ulp off is within its
        bounds, and then nothing further is exact.
        """
        found = super().findings(inputs, outputs, p, contract)
        spec = model_of(p).router
        weight = 1.0 / (spec.top_k if spec.normalize else spec.num_experts)
        red = any(f.status.colour == "red" for f in found)
        if red or (wide(outputs["weights_TK"]) != weight).any():
            return found
        return [*found, *self._bits(inputs, outputs, p, weight)]

    def _bits(self, inputs: Arrays, outputs: Arrays, p: Params, weight: float) -> list[Finding]:
        chosen, x, dy = inputs["experts_TK"], wide(inputs["x_TD"]), wide(inputs["dy_TD"])
        tokens, top_k = chosen.shape
        slot_R, counts_E = sent(chosen, model_of(p).router.num_experts)
        rows_RD, up_RD = x[slot_R // top_k], weight * dy[slot_R // top_k]
        y_RD, dx_RD = np.zeros_like(rows_RD), np.zeros_like(rows_RD)
        meters = {name: ExactMeter(f"bits of d{name}") for name in ROUTED}
        for e, rows in spans(counts_E):
            w1, w3, w2 = (wide(inputs[name][e]) for name in ROUTED)
            y_RD[rows], dx_RD[rows], gradients = _expert(rows_RD[rows], up_RD[rows], w1, w3, w2)
            for name, gradient in zip(ROUTED, gradients, strict=True):
                meters[name].add(outputs[f"d{name}"][e : e + 1], make.store(gradient, p.dtype)[None], e)
        y = (weight * gather_rows(y_RD, slot_R, tokens, top_k)).sum(1)
        dx = gather_rows(dx_RD, slot_R, tokens, top_k).sum(1)
        found = [meter.finding() for meter in meters.values()]
        if SHARED[0] in inputs:
            more, _, gradients = _expert(x, dy, *(wide(inputs[name]) for name in SHARED))
            y = y + more
            found += [
                exact(f"bits of d{name}", outputs[f"d{name}"], make.store(gradient, p.dtype))
                for name, gradient in zip(SHARED, gradients, strict=True)
            ]
        return [
            exact("bits of y", outputs["y_TD"], make.store(y, p.dtype)),
            exact("bits of dx", outputs["dx_TD"], make.store(dx, p.dtype)),
            *found,
        ]


class NanUpstream(Integers):
    """One NaN in the gradient of y."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        dy = arrays["dy_TD"].copy()
        dy[len(dy) // 2, int(make.integers(p.seed, "layer/nan", 0, dy.shape[1] - 1, 1)[0])] = np.nan
        return {**arrays, "dy_TD": dy}

    @np.errstate(all="ignore")
    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Layer.findings`."""
        keeps_nonfinite(contract)
        return super().findings(inputs, outputs, p, contract)


class Overflow(Integers):
    """Gradients of a token's rows that are finite, and whose sum over its choices overflows float16."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: with float32's range the sums of the gate's gradient would overflow, too."""
        return ("float16",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        dy of one token is V = 1024 in one channel, and zero elsewhere. The shared expert's w2 is zero there; its dw2 is
        V h, which overflows, too. A row of a routed w2 has one 1 or -1, so du = 64 w V = V in one unit, a row of dx is
        V w3, at most 42 V = 43,008, and the sum of K = 6 of those in float32 is exact: an infinity, or a number,
        whatever the order.
        """
        arrays = super().inputs(p)
        dy = arrays["dy_TD"].copy()
        dy[len(dy) // 2] = 0
        dy[len(dy) // 2, make.permutation(p.seed, "layer/integers/channels", dy.shape[1])[-1]] = 1024.0
        return {**arrays, "dy_TD": dy}

    @np.errstate(all="ignore")
    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Layer.findings`."""
        keeps_nonfinite(contract)
        return super().findings(inputs, outputs, p, contract)


def _expert(x: F64, dy: F64, w1: F64, w3: F64, w2: F64) -> tuple[F64, F64, tuple[F64, F64, F64]]:
    """Return y, dx and the gradients of the weights of one expert whose gate is `ONE` everywhere."""
    u, dh = x @ w3.T, dy @ w2
    du, dg = ONE * dh, dh * u
    return ONE * u @ w2.T, dg @ w1 + du @ w3, (dg.T @ x, du.T @ x, dy.T @ (ONE * u))


INTEGERS = Integers(
    "layer.integers", "layer", ("layer",),
    "A whole layer with a replayed routing and a gate of zeros, on integers: equal scores make every weight a power of "
    "two, and y and all gradients but the gate's are the same in every order of summation, bit by bit. In the 16-bit "
    "dtypes the sum of the routed and the shared output needs rounding, both summands do not: a last addition that "
    "truncates shows. So do sums over a token's choices, of rows or of gradients, that are added up in 16 bits. Bounds "
    "besides, as ever.",
    replayed=True, backward=True, only=("deepseek-v2-lite", "olmoe"),
)  # fmt: skip
CASES = (
    INTEGERS,
    NanUpstream(
        "layer.nan_backward", "layer", ("layer",),
        "As layer.integers with one NaN in the upstream gradient: NaN are the gradients of its token, of its K "
        "experts' weights, of the shared expert's and of the gate; in down projections only the rows that it reaches. "
        "Every other gradient is exact.",
        replayed=True, backward=True, only=("deepseek-v2-lite",),
    ),
    Overflow(
        "layer.overflow_backward", "layer", ("layer",),
        "As layer.integers, in float16, with one large element in the upstream gradient: elements of its token's "
        "gradient are infinite, bit by bit, and no largest finite number, which would hide the overflow from loss "
        "scaling. Every other gradient is exact.",
        replayed=True, backward=True, only=("deepseek-v2-lite",),
    ),
    Frozen("layer.frozen", INTEGERS, ("x_TD", "gate_ED"), twice=True),
    Frozen("layer.frozen_parts", BACKWARD, only=("qwen2-moe",)),
    Frozen("layer.frozen_gate", ONE_TOKEN, ("gate_ED",), only=("ling-2.0-mini",)),
    Frozen("layer.frozen_capacity", CAPACITY, ("gate_ED",), only=FEW_EXPERTS),
    Sliced("layer.sliced", INTEGERS),
)  # fmt: skip
