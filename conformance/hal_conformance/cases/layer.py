# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815  (fields carry their shapes)
"""A whole layer, forward and backward, with the device's own routing and with a replayed one.

The routing is judged first; everything after it is conditional on the device's own choice, logits and weights,
since two
right devices may choose differently where the margin is open. The rest is a black box: variances are chained
through it.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices, R routed rows, S shared width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Arithmetic, Contract
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.bounds import U32, logistic, matmul
from hal_conformance.budget import level
from hal_conformance.case import F64, I64, Arrays, Params
from hal_conformance.cases.base import (
    Base,
    arithmetic,
    gate_storage,
    model_of,
    router_arrays,
    shape,
    weight_storage,
    wide,
)  # fmt: skip
from hal_conformance.cases.dispatch import sent
from hal_conformance.cases.experts import WEIGHTS, chained
from hal_conformance.cases.router import expected_structure, scores_of, weights_of
from hal_conformance.detectors import Finding, discrete, judge, merge, structure
from hal_conformance.margins import certify, judge_choice
from hal_conformance.oracle import experts, experts_backward, gather_rows, product, store_variance
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch

SHARED = ("shared_w1_SD", "shared_w3_SD", "shared_w2_DS")


@dataclass(frozen=True)
class Layer(Base):
    """One call of a layer.

    Attributes:
        replayed: whether the experts are given.
        backward: whether the gradients are judged, too.
    """

    replayed: bool = False
    backward: bool = False

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        model, s = model_of(p), shape(p)
        spec = model.router
        arrays = router_arrays(p, "layer")
        scale = np.sqrt(s.width) / make.typical_norm(s.width)
        x = make.activations(p.seed, "layer/x", s.tokens, s.width)
        arrays["x_TD"] = make.store(x * scale, p.dtype)
        gate = make.gate(p.seed, "layer/gate", spec.num_experts, s.width) / scale
        arrays["gate_ED"] = make.store(gate, gate_storage(spec, p))
        dims = {"w1_EFD": (s.hidden, s.width), "w3_EFD": (s.hidden, s.width), "w2_EDF": (s.width, s.hidden)}
        for name, sizes in dims.items():
            arrays[name] = make.store(make.weights(p.seed, f"layer/{name}", spec.num_experts, *sizes), p.dtype)
        if model.num_shared_experts:
            width = model.shared_hidden_size
            for name, sizes in zip(SHARED, ((width, s.width), (width, s.width), (s.width, width)), strict=True):
                arrays[name] = make.store(make.weights(p.seed, f"layer/{name}", *sizes), p.dtype)
        if model.shared_gate:
            arrays["shared_gate_D"] = make.store(make.weights(p.seed, "layer/shared_gate", s.width), p.dtype)
        if self.replayed:
            arrays["experts_TK"] = make.choices(p.seed, "layer", s.tokens, spec.num_experts, spec.top_k)
        if self.backward:
            arrays["dy_TD"] = make.store(make.normal(p.seed, "layer/dy", s.tokens, s.width), p.dtype)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        from hal.moe.ops import ExpertWeights, LayerWeights

        leaves = dict(tensors)
        trained = ("x_TD", "gate_ED", *WEIGHTS)
        if self.backward:
            leaves |= {name: tensors[name].clone().requires_grad_() for name in trained}
        weights = LayerWeights(
            leaves["gate_ED"],
            leaves.get("bias_E"),
            ExpertWeights(*(leaves[name] for name in WEIGHTS)),
            tuple(leaves[name] for name in SHARED) if SHARED[0] in leaves else None,  # type: ignore[arg-type]
            leaves.get("shared_gate_D"),
        )
        out = ops.layer(leaves["x_TD"], weights, model_of(p), experts_TK=leaves.get("experts_TK"))
        result = {"y_TD": out.y_TD, "aux_loss": out.aux_loss, "z_loss": out.z_loss, **out.routing._asdict()}
        if self.backward:
            out.y_TD.backward(tensors["dy_TD"])
            result |= {f"d{name}": leaves[name].grad for name in trained if leaves[name].grad is not None}
        return {name: tensor.detach() for name, tensor in result.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        spec = model_of(p).router
        x = inputs["x_TD"]
        shapes = expected_structure(spec, p, len(x)) | {
            "y_TD": (x.shape, p.dtype), "aux_loss": ((), "float32"), "z_loss": ((), "float32"),
        }  # fmt: skip
        if self.backward:
            shapes["dx_TD"] = (x.shape, p.dtype)
            shapes["dgate_ED"] = (inputs["gate_ED"].shape, gate_storage(spec, p))
            shapes |= {f"d{name}": (inputs[name].shape, p.dtype) for name in WEIGHTS}
        wrong = structure(outputs, shapes)
        if wrong is not None:
            return wrong
        found = self._routing(inputs, outputs, p, spec, contract)
        if any(f.status.colour == "red" for f in found):
            return merge(found)
        inside = Inside.of(inputs, outputs, p, contract)
        found.append(judge("y", outputs["y_TD"], chained(inside.y, inside.var_y, p.dtype), independent=len(x)))
        for name in ("aux_loss", "z_loss"):
            if not np.isfinite(wide(outputs[name])):
                found.append(Finding(Status.FAIL_NONFINITE, detail=f"{name} is {outputs[name]}"))
        if self.backward:
            found += inside.gradients(inputs, outputs, p, contract)
        return merge(found)

    def _routing(
        self, inputs: Arrays, outputs: Arrays, p: Params, spec: RouterSpec, contract: Contract
    ) -> list[Finding]:
        storage = gate_storage(spec, p)
        got = outputs["logits_TE"]
        at = level(got.size)
        exact = matmul(wide(inputs["x_TD"]), wide(inputs["gate_ED"]).T, arithmetic(contract, storage), at)
        found = [judge("logits", got, exact.stored(storage))]
        scores = scores_of(got, spec, at)
        if self.replayed:
            found.append(discrete("replayed experts", outputs["experts_TK"], inputs["experts_TK"]))
        else:
            bias = wide(inputs["bias_E"]) if spec.selection_bias else None
            found.append(judge_choice(outputs["experts_TK"], certify(scores, bias, spec)))
        if not any(f.status.colour == "red" for f in found):
            expected = weights_of(scores, outputs["experts_TK"], spec, weight_storage(spec, p))
            found.append(judge("weights", outputs["weights_TK"], expected))
        return found


@dataclass(frozen=True)
class Inside:
    """The oracle's layer, from the device's own logits, choice and weights."""

    y: F64
    var_y: F64
    x: F64
    experts_TK: I64
    weights_TK: F64
    slot_R: I64
    counts_E: I64
    o_TKD: F64
    var_o_TKD: F64

    @classmethod
    def of(cls, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Inside:
        """Compute the forward pass."""
        spec, rule = model_of(p).router, arithmetic(contract, p.dtype)
        x, chosen, weights = wide(inputs["x_TD"]), outputs["experts_TK"], wide(outputs["weights_TK"])
        slot_R, counts_E = sent(chosen, spec.num_experts)
        w1, w3, w2 = (wide(inputs[name]) for name in WEIGHTS)
        o_RD, var_RD = experts(x[slot_R // spec.top_k], counts_E, w1, w3, w2, p.dtype, rule)
        o = gather_rows(o_RD, slot_R, len(x), spec.top_k)
        var_o = gather_rows(var_RD, slot_R, len(x), spec.top_k)
        w = weights[:, :, None]
        absolute = np.abs(w * o).sum(1)
        y, var = (w * o).sum(1), (w**2 * var_o).sum(1) + (2 * spec.top_k - 1) * (U32 * absolute) ** 2 / 3.0
        var = store_variance(y, var, p.dtype)
        if SHARED[0] in inputs:
            extra, var_extra = _shared(inputs, x, p, rule)
            y = y + extra
            var = store_variance(y, var + var_extra, p.dtype)
        return cls(y, var, x, chosen, weights, slot_R, counts_E, o, var_o)

    def gradients(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """Judge the gradients of x, the gate and the routed experts."""
        spec, rule, dtype = model_of(p).router, arithmetic(contract, p.dtype), p.dtype
        dy = wide(inputs["dy_TD"])
        k = spec.top_k
        do = dy[self.slot_R // k] * self.weights_TK.reshape(-1)[self.slot_R, None]
        var_do = store_variance(do, (U32 * do) ** 2 / 3.0, dtype)
        w1, w3, w2 = (wide(inputs[name]) for name in WEIGHTS)
        g = experts_backward(self.x[self.slot_R // k], self.counts_E, w1, w3, w2, do, dtype, rule, var_do)
        rows = gather_rows(g.dx, self.slot_R, len(self.x), k)
        parts = [(rows.sum(1), store_variance(rows.sum(1), gather_rows(g.var_dx, self.slot_R, len(self.x), k).sum(1)
                  + (k * U32 * np.abs(rows).sum(1)) ** 2 / 3.0, dtype))]  # fmt: skip
        dlogits, var_dlogits = self._dlogits(outputs, dy, p, spec)
        gate_rule = arithmetic(contract, gate_storage(spec, p))
        dgate, var_dgate = product(dlogits.T, var_dlogits.T, self.x, 0.0, gate_rule)
        var_dgate = store_variance(dgate, var_dgate, gate_storage(spec, p))
        back, var_back = product(dlogits, var_dlogits, wide(inputs["gate_ED"]), 0.0, gate_rule)
        parts.append((back, store_variance(back, store_variance(back, var_back, gate_storage(spec, p)), dtype)))
        if SHARED[0] in inputs:
            parts += _shared_dx(inputs, self.x, dy, p, rule)
        dx = sum((value for value, _ in parts), np.zeros_like(self.x))
        # Parts share errors: (a + b + ...)^2 <= n (a^2 + b^2 + ...). Each addition of two gradients is stored.
        var_dx = len(parts) * sum((var for _, var in parts), np.zeros_like(self.x))
        for _ in parts[1:]:
            var_dx = store_variance(dx, var_dx, dtype)
        pairs = {
            "dx_TD": (dx, var_dx, dtype), "dgate_ED": (dgate, var_dgate, gate_storage(spec, p)),
            "dw1_EFD": (g.dw1, g.var_dw1, dtype), "dw3_EFD": (g.dw3, g.var_dw3, dtype),
            "dw2_EDF": (g.dw2, g.var_dw2, dtype),
        }  # fmt: skip
        # Independent errors: one for each token, and one for each expert that has rows; every token has a part in
        # every element of the gate's gradient.
        blocks = {"dx_TD": len(dx), "dgate_ED": 1}
        used = int((self.counts_E > 0).sum())
        return [
            judge(name, outputs[name], chained(value, var, storage), independent=blocks.get(name, used))
            for name, (value, var, storage) in pairs.items()
        ]

    def _dlogits(self, outputs: Arrays, dy: F64, p: Params, spec: RouterSpec) -> tuple[F64, F64]:
        """Return the logits' gradient and its variance.

        Each step is linear in the gradient above it, with coefficients made of scores: the variance of the one,
        plus the
        coefficients' relative error squared times the sum of absolute terms squared, since differences cancel.
        """
        terms = self.o_TKD * dy[:, None, :]
        width = terms.shape[2]
        dw = terms.sum(2)
        var_dw = (dy[:, None, :] ** 2 * self.var_o_TKD).sum(2)
        var_dw = var_dw + U32**2 / 3 * width * (5 / 24 * (terms**2).sum(2) + dw**2 / 3)
        var_dw = store_variance(dw, var_dw, weight_storage(spec, p))
        scores = scores_of(outputs["logits_TE"], spec, level(outputs["logits_TE"].size))
        at = np.arange(len(dw))[:, None]
        s, error = scores.value[at, self.experts_TK], scores.bound[at, self.experts_TK]
        relative = (error / s).max(1, keepdims=True) + (spec.top_k + 4) * U32
        if spec.normalize:
            share = s / (s.sum(1, keepdims=True) + spec.normalize_epsilon)
            factor = spec.scaling_factor / (s.sum(1, keepdims=True) + spec.normalize_epsilon)
            ds = factor * (dw - (dw * share).sum(1, keepdims=True))
            size = factor * (np.abs(dw) + (np.abs(dw) * share).sum(1, keepdims=True))
            var_ds = 2 * factor**2 * (var_dw + (share**2 * var_dw).sum(1, keepdims=True)) + (size * 2 * relative) ** 2
        else:
            ds, var_ds = dw * spec.scaling_factor, spec.scaling_factor**2 * (var_dw + (dw * relative) ** 2)
        full, var_full = np.zeros_like(scores.value), np.zeros_like(scores.value)
        full[at, self.experts_TK], var_full[at, self.experts_TK] = ds, var_ds
        q = scores.value
        if spec.score == "softmax":
            dlogits = q * (full - (q * full).sum(1, keepdims=True))
            size = q * (np.abs(full) + (q * np.abs(full)).sum(1, keepdims=True))
            var = 2 * q**2 * (var_full + (q**2 * var_full).sum(1, keepdims=True))
            var = var + (size * (2 * scores.bound / np.maximum(q, 2.0**-126) + 4 * U32 + relative)) ** 2
        else:
            dlogits = full * q * (1 - q)
            var = (q * (1 - q)) ** 2 * var_full + (full * (2 * scores.bound + 4 * U32 * q)) ** 2
        return dlogits, store_variance(dlogits, var, gate_storage(spec, p))


def _shared(inputs: Arrays, x: F64, p: Params, rule: Arithmetic) -> tuple[F64, F64]:
    """Return the shared experts' output and its variance, gated where the model gates it."""
    w1, w3, w2 = (wide(inputs[name])[None] for name in SHARED)
    y, var = experts(x, np.array([len(x)]), w1, w3, w2, p.dtype, rule)
    if "shared_gate_D" not in inputs:
        return y, var
    s, var_s, _, _ = _gate(inputs, x, p, rule)
    value = s * y
    return value, store_variance(value, s**2 * var + y**2 * var_s + var * var_s + (U32 * value) ** 2, p.dtype)


def _gate(inputs: Arrays, x: F64, p: Params, rule: Arithmetic) -> tuple[F64, F64, F64, F64]:
    """Return the shared gate's sigmoid with its variance, and its logit with its own, [T, 1] each."""
    t, var_t = product(x, 0.0, wide(inputs["shared_gate_D"])[:, None], 0.0, rule)
    var_t = store_variance(t, var_t, p.dtype)
    s = logistic(t)
    own = s * U32 * ((1 - s) * (2 * np.abs(t) + 4) + 3)
    return s, store_variance(s, (s * (1 - s)) ** 2 * var_t + own**2 / 3, p.dtype), t, var_t


def _shared_dx(inputs: Arrays, x: F64, dy: F64, p: Params, rule: Arithmetic) -> list[tuple[F64, F64]]:
    """Return the shared experts' contributions to the gradient of x, each with its variance."""
    w1, w3, w2 = (wide(inputs[name])[None] for name in SHARED)
    counts = np.array([len(x)])
    if "shared_gate_D" not in inputs:
        g = experts_backward(x, counts, w1, w3, w2, dy, p.dtype, rule)
        return [(g.dx, g.var_dx)]
    s, var_s, _, _ = _gate(inputs, x, p, rule)
    up = dy * s
    var_up = store_variance(up, dy**2 * var_s + (U32 * up) ** 2, p.dtype)
    g = experts_backward(x, counts, w1, w3, w2, up, p.dtype, rule, var_up)
    y, var_y = experts(x, counts, w1, w3, w2, p.dtype, rule)
    terms = y * dy  # each product may be stored before the sum over D
    ds = terms.sum(1, keepdims=True)
    squares = (terms**2).sum(1, keepdims=True)
    own = U32**2 / 3 * x.shape[1] * (5 / 24 * squares + ds**2 / 3)
    stored = store_variance(terms, (U32 * terms) ** 2, p.dtype).sum(1, keepdims=True)
    var_ds = store_variance(ds, (dy**2 * var_y).sum(1, keepdims=True) + own + stored, p.dtype)
    slope = s * (1 - s)
    dt = ds * slope
    # d slope / d s = 1 - 2 s, at most 1.
    var_dt = store_variance(dt, slope**2 * var_ds + ds**2 * var_s + (4 * U32 * dt) ** 2, p.dtype)
    back, var_back = product(dt, var_dt, wide(inputs["shared_gate_D"])[None, :], 0.0, rule)
    return [(g.dx, g.var_dx), (back, store_variance(back, var_back, p.dtype))]


def _layer(name: str, *, replayed: bool, backward: bool) -> Layer:
    how = "a replayed routing" if replayed else "the device's own routing, certified by margin and then taken as given"
    what = "y and the gradients of x, the gate and the experts" if backward else "y"
    return Layer(
        f"layer.{name}", "layer", ("layer",),
        f"A whole layer with {how}: logits, weights, {what}. Bound: chained variances, lambda "
        "deviations and half an ulp.",
        replayed=replayed, backward=backward,
    )  # fmt: skip


CASES = (
    _layer("forward_replayed", replayed=True, backward=False),
    _layer("forward_free", replayed=False, backward=False),
    _layer("backward_replayed", replayed=True, backward=True),
    _layer("backward_free", replayed=False, backward=True),
)
