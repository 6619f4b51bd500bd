# SPDX-License-Identifier: Apache-2.0
"""A whole layer, forward and backward, from the device's own logits, choice and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hal.contract import Contract
from hal.moe.model_spec import MoEModelSpec
from hal_conformance.case import I64, Arrays, arithmetic
from hal_conformance.numerics.bounds import U32
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.chained import Chained, dot, product, sigmoid, together
from hal_conformance.oracle.dispatching import combine_chained, gather, sent
from hal_conformance.oracle.experts import Swiglu, SwigluGradients, each, unknown
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.oracle.routing import scores_of, stored_logits_gradient

ROUTED = ("w1_EFD", "w3_EFD", "w2_EDF")
SHARED = ("shared_w1_SD", "shared_w3_SD", "shared_w2_DS")
SHARED_GATE = "shared_gate_D"


@dataclass(frozen=True)
class LayerValues:
    """What a layer returns.

    Attributes:
        y: [T, D], stored.
        gradients: by the name of what they belong to, without those of the routed experts' weights; stored.
        used: how many experts have rows.
    """

    y: Chained
    gradients: dict[str, Chained] = field(default_factory=dict)
    used: int = 0


def layer(
    given: Arrays,
    observed: Arrays,
    model: MoEModelSpec,
    dtype: str,
    gate_dtype: str,
    weight_dtype: str,
    contract: Contract,
    *,
    capacity: int | None = None,
    on_experts: Callable[[I64, SwigluGradients], None] | None = None,
) -> LayerValues:
    """Compute the layer; with `on_experts`, and `dy_TD` among the inputs, its gradients, too.

    Args:
        given: inputs of the case.
        observed: the device's routing: `logits_TE`, `experts_TK`, `weights_TK`.
        model: the layer.
        dtype: storage of activations and weights.
        gate_dtype: storage of the gate's weights and of the logits.
        weight_dtype: storage of the routing weights.
        contract: of the device.
        capacity: most rows of an expert.
        on_experts: called with the gradients of a few experts at a time, of all that have rows and are needed.
    """
    spec, rule = model.router, arithmetic(contract, dtype)
    tokens, k = observed["experts_TK"].shape
    chosen, weights = observed["experts_TK"], np.asarray(observed["weights_TK"], np.float64)
    slot_R, counts_E = sent(chosen, spec.num_experts, capacity)
    x_RD = given["x_TD"][slot_R // k]
    upstream = None
    if on_experts is not None:
        dy = np.asarray(given["dy_TD"], np.float64)
        by_slot = Chained.exact(weights.reshape(-1)[slot_R, None])
        upstream = (Chained.exact(dy[slot_R // k]) * by_slot).stored(dtype)
    o_RD, dx_RD = unknown(x_RD.shape), unknown(x_RD.shape)
    w1, w3, w2 = (given[name] for name in ROUTED)
    for part in each(x_RD, counts_E, (w1, w3, w2), dtype, rule, slot_R // k):
        o_RD[part.rows] = part.inside.y
        if upstream is not None and on_experts is not None:
            gradients = part.inside.backward(upstream[part.rows])
            dx_RD[part.rows] = gradients.dx
            if part.whole:
                on_experts(part.experts, gradients)
    o_TKD = gather(o_RD, slot_R, tokens, k)
    y = combine_chained(o_TKD, weights, dtype)
    shared = _Shared.of(given, dtype, contract) if SHARED[0] in given else None
    if shared is not None:
        y = (y + shared.y).stored(dtype)
    used = int((counts_E > 0).sum())
    if upstream is None:
        return LayerValues(y, used=used)

    rows_TKD = gather(dx_RD, slot_R, tokens, k)
    absolute = np.abs(rows_TKD.value).sum(1)
    added = Chained(rows_TKD.value.sum(1), rows_TKD.var.sum(1) + (k * U32 * absolute) ** 2 / 3.0)
    scores = scores_of(observed["logits_TE"], spec, level(observed["logits_TE"].size))
    dweights = dot(o_TKD, dy[:, None, :]).stored(weight_dtype)
    _, dscores = aux_loss(observed["scores_TE"], chosen, spec)
    _, dz = z_loss(observed["logits_TE"])
    daux, dz_loss = (float(given[name]) for name in ("daux", "dz"))
    by_losses = (Chained.of(dscores.scaled(daux)), Chained.of(dz.scaled(dz_loss)))
    dlogits = stored_logits_gradient(dweights, scores, chosen, spec, gate_dtype, *by_losses)
    gate_rule = arithmetic(contract, gate_dtype)
    x, gate = Chained.exact(given["x_TD"]), Chained.exact(given["gate_ED"])
    found = {"gate_ED": product(dlogits.T, x, gate_rule).stored(gate_dtype)}
    parts = [added.stored(dtype), product(dlogits, gate, gate_rule).stored(gate_dtype).stored(dtype)]
    if shared is not None:
        more, others = shared.backward(Chained.exact(dy))
        parts += more
        found |= others
    dx = together(*parts)
    for _ in parts[1:]:  # each addition of two gradients is stored
        dx = dx.stored(dtype)
    return LayerValues(y, {"x_TD": dx, **found}, used)


@dataclass(frozen=True)
class _Shared:
    """The shared experts as one wide expert, gated where the model gates it; y is stored."""

    inside: Swiglu
    gate: Chained | None
    gate_D1: Chained | None
    y: Chained

    @classmethod
    def of(cls, given: Arrays, dtype: str, contract: Contract) -> _Shared:
        rule = arithmetic(contract, dtype)
        w1, w3, w2 = (given[name] for name in SHARED)
        inside = Swiglu.of(Chained.exact(given["x_TD"]), (w1, w3, w2), dtype, rule)
        if SHARED_GATE not in given:
            return cls(inside, None, None, inside.y)
        gate_D1 = Chained.exact(given[SHARED_GATE][:, None])
        gate = sigmoid(product(inside.x, gate_D1, rule).stored(dtype)).stored(dtype)
        return cls(inside, gate, gate_D1, (gate * inside.y).stored(dtype))

    def backward(self, dy: Chained) -> tuple[list[Chained], dict[str, Chained]]:
        """Return the contributions to the gradient of x, and the gradients of the shared weights."""
        dtype, rule = self.inside.dtype, self.inside.rule
        if self.gate is None or self.gate_D1 is None:
            gradients = self.inside.backward(dy)
            return [gradients.dx], dict(zip(SHARED, gradients.weights, strict=True))
        s = self.gate
        gradients = self.inside.backward((dy * s).stored(dtype))
        terms = (self.inside.y * dy).stored(dtype)  # each product may be stored before the sum over D
        total = dot(self.inside.y, dy.value)
        ds = Chained(total.value, total.var + terms.var.sum(1))[:, None].stored(dtype)
        # d slope / d s = 1 - 2 s, at most 1; one minus s and two products round.
        slope = s.value * (1.0 - s.value)
        dt = Chained(ds.value * slope, slope**2 * ds.var + ds.value**2 * s.var + (4 * U32 * ds.value * slope) ** 2)
        dt = dt.stored(dtype)
        others = dict(zip(SHARED, gradients.weights, strict=True))
        others[SHARED_GATE] = product(dt.T, self.inside.x, rule).stored(dtype)[0]
        return [gradients.dx, product(dt, self.gate_D1.T, rule).stored(dtype)], others
