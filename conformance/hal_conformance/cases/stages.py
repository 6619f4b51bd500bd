# SPDX-License-Identifier: Apache-2.0
"""The stages of a model's forward and backward pass, each judged from the device's own inputs to it.

Legend: T tokens, D model dim, V vocabulary, P joint projection, H query heads, G key heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import Array, Arrays, Params, arithmetic
from hal_conformance.cases.base import wide
from hal_conformance.cases.layer_judging import judge_layer
from hal_conformance.cases.weight_gradients import WeightGradients
from hal_conformance.language import parameters as named
from hal_conformance.language.spec import LanguageSpec
from hal_conformance.numerics.bounds import U32, Bounded
from hal_conformance.numerics.chained import Chained, product
from hal_conformance.numerics.detectors import Finding, exact, judge
from hal_conformance.oracle.attention import attention_backward
from hal_conformance.oracle.cross_entropy import cross_entropy
from hal_conformance.oracle.experts import each
from hal_conformance.oracle.norm_head import NormHead
from hal_conformance.oracle.norms import rms_norm
from hal_conformance.oracle.rotary import rotary

IGNORED = -100


class Stages:
    """One batch through the model and back.

    Args:
        spec: the model.
        given: its parameters by name, float32; `tokens_BL`, `targets_BL`; `cos_LR`, `sin_LR`.
        got: what the taps of `language.model.losses` saw, by name; the gradient of each as "d:" and the name; the
            parameters' gradients as "raw/" and the name. Shapes and dtypes are right.
        p: of the case; its dtype is that of the arithmetic.
        contract: of the device.
    """

    def __init__(self, spec: LanguageSpec, given: Arrays, got: Arrays, p: Params, contract: Contract) -> None:
        self._spec, self._given, self._got, self._p, self._contract = spec, given, got, p, contract
        self._dtype = p.dtype
        self._tokens = given["tokens_BL"].reshape(-1)
        self._rule = arithmetic(contract, p.dtype)
        self._forward: list[Finding] = []
        self._backward: list[Finding] = []

    def findings(self) -> list[Finding]:
        """Return what the detectors say, in the order in which the device computed, so that the first is the cause."""
        self._same(self._forward, "the embedded tokens", self._got["x"], self._weight(named.EMBEDDING)[self._tokens])
        self._embedding_backward()
        x = "x"
        for layer in range(self._spec.layers):
            x = self._block(layer, x)
        self._norm("the last norm", x, "normed", named.NORM)
        self._head()
        self._losses()
        return self._forward + self._backward[::-1]

    def _weight(self, name: str) -> Array:
        """Return a parameter as the arithmetic sees it."""
        return make.store(wide(self._given[name]), self._dtype)

    def _weight_gradient(self, name: str) -> Array:
        """Return a parameter's gradient: numbers of the arithmetic's dtype in float32, as autograd casts them."""
        return self._got[f"raw/{name}"]

    def _same(self, where: list[Finding], what: str, got: Array, expected: Array) -> None:
        where.append(exact(what, got, expected))

    def _judge(self, what: str, got: Array, expected: Chained, free: int, *, back: bool = False) -> None:
        finding = judge(what, got, expected.bounded(self._dtype), independent=free)
        (self._backward if back else self._forward).append(finding)

    def _local(self, what: str, got: Array, expected: Bounded, free: int, *, back: bool = False) -> None:
        finding = judge(what, got, expected.stored(self._dtype), independent=free)
        (self._backward if back else self._forward).append(finding)

    def _block(self, layer: int, x: str) -> str:
        """Judge a block whose input is seen as `x`; return the name of its output."""

        def at(name: str) -> str:
            return named.of(layer, name)

        got, where = self._got, f"block {layer}, "
        self._same(self._forward, f"{where}input of the norm", got[at("attention_in")], got[x])
        self._added_gradient(f"{where}input", x, at("h"), at("attention_in"))
        self._norm(f"{where}attention's norm", at("attention_in"), at("attention_normed"), at(named.ATTENTION_NORM))
        self._linear(f"{where}projection", at("attention_normed"), at(named.PROJECTION), at("qkv"))
        self._attention(where, layer)
        self._linear(f"{where}output projection", at("attention"), at(named.OUTPUT), at("attention_out"))
        self._same(self._backward, f"{where}gradient of attention's output", got["d:" + at("attention_out")],
                   got["d:" + at("h")])  # fmt: skip
        self._added(f"{where}residual of attention", at("h"), x, at("attention_out"))
        self._same(self._forward, f"{where}input of the MLP's norm", got[at("mlp_in")], got[at("h")])
        self._added_gradient(f"{where}middle", at("h"), at("out"), at("mlp_in"))
        self._norm(f"{where}MLP's norm", at("mlp_in"), at("mlp_normed"), at(named.MLP_NORM))
        if self._spec.experts is None:
            self._dense(where, layer)
        else:
            self._experts(where, layer)
        self._same(self._backward, f"{where}gradient of the MLP's output", got["d:" + at("mlp")], got["d:" + at("out")])
        self._added(f"{where}residual of the MLP", at("out"), at("h"), at("mlp"))
        return at("out")

    def _added(self, what: str, y: str, a: str, b: str) -> None:
        """y = a + b, rounded once."""
        total = wide(self._got[a]) + wide(self._got[b])
        self._local(what, self._got[y], Bounded.exact(total), total.size)

    def _added_gradient(self, what: str, x: str, straight: str, branch: str) -> None:
        """The gradient of what two paths read is the sum of theirs, rounded once."""
        total = wide(self._got[f"d:{straight}"]) + wide(self._got[f"d:{branch}"])
        self._local(
            f"{what}: gradient over both paths", self._got[f"d:{x}"], Bounded.exact(total), total.size, back=True
        )

    def _norm(self, what: str, x: str, y: str, weight: str) -> None:
        values = self._got[x]
        want = rms_norm(values, self._weight(weight), self._got[f"d:{y}"], self._spec.eps)
        rows = len(values)
        self._local(what, self._got[y], want.y, rows)
        self._local(f"{what}: gradient of the weight", self._weight_gradient(weight), want.dweight, 1, back=True)
        self._local(f"{what}: gradient of the input", self._got[f"d:{x}"], want.dx, rows, back=True)

    def _linear(self, what: str, x: str, weight: str, y: str) -> None:
        """y = x W^T; each of the three products is stored."""
        values, w, dy = (Chained.exact(a) for a in (self._got[x], self._weight(weight), self._got[f"d:{y}"]))
        rows = len(values.value)
        self._judge(what, self._got[y], product(values, w.T, self._rule).stored(self._dtype), values.value.size)
        dw = product(dy.T, values, self._rule).stored(self._dtype)
        self._judge(f"{what}: gradient of the weight", self._weight_gradient(weight), dw, w.value.size, back=True)
        dx = product(dy, w, self._rule).stored(self._dtype)
        self._judge(f"{what}: gradient of the input", self._got[f"d:{x}"], dx, rows, back=True)

    def _attention(self, where: str, layer: int) -> None:
        got, spec = self._got, self._spec
        cos, sin = self._given["cos_LR"], self._given["sin_LR"]
        heads, keys, width = spec.heads, spec.key_heads, spec.head_width
        sequences, length = self._given["tokens_BL"].shape
        parts = {"q": (0, heads), "k": (heads, keys), "v": (heads + keys, keys)}
        for n in range(sequences):
            rows = slice(n * length, (n + 1) * length)

            def at(name: str, n: int = n) -> str:
                return named.of(layer, f"{name}{n}")

            sequence = f"{where}sequence {n}, "
            for name, (first, count) in parts.items():
                place = slice(first * width, (first + count) * width)
                for lead, to in (("", self._forward), ("d:", self._backward)):
                    joint = got[lead + named.of(layer, "qkv")][rows, place].reshape(length, count, width)
                    self._same(to, f"{sequence}{lead}{name}", got[lead + at(name)], joint)
            for name in "qk":
                self._local(f"{sequence}rotated {name}", got[at(f"r{name}")], rotary(got[at(name)], cos, sin),
                            got[at(name)].size)  # fmt: skip
                self._local(f"{sequence}gradient of {name}", got["d:" + at(name)],
                            rotary(got["d:" + at(f"r{name}")], cos, -sin), got[at(name)].size, back=True)  # fmt: skip
            want = attention_backward(
                got[at("rq")], got[at("rk")], got[at("v")], got["d:" + at("a")], width**-0.5, True, self._dtype,
                self._rule,
            )  # fmt: skip
            self._local(f"{sequence}attention", got[at("a")], want.y.within_deviations(), length * heads)
            for name, gradient in (("rq", want.dq), ("rk", want.dk), ("v", want.dv)):
                free = length * got[at(name)].shape[1]
                self._local(f"{sequence}attention: gradient of {name}", got["d:" + at(name)],
                            gradient.within_deviations(), free, back=True)  # fmt: skip
            for lead, to in (("", self._forward), ("d:", self._backward)):
                joint = got[lead + named.of(layer, "attention")][rows].reshape(length, heads, width)
                self._same(to, f"{sequence}{lead}heads side by side", joint, got[lead + at("a")])

    def _dense(self, where: str, layer: int) -> None:
        def at(name: str) -> str:
            return named.of(layer, name)

        x, dy = self._got[at("mlp_normed")], self._got["d:" + at("mlp")]
        counts = np.array([len(x)])
        weights = [self._weight(at(name)) for name in named.ROUTED]
        gradients = {f"d{name}": self._weight_gradient(at(name)) for name in named.ROUTED}
        meters = WeightGradients(gradients, counts, self._dtype)
        for part in each(x, counts, (weights[0], weights[1], weights[2]), self._dtype, self._rule):
            back = part.inside.backward(Chained.exact(dy)[part.rows])
            self._judge(f"{where}MLP", self._got[at("mlp")], part.inside.y[0], len(x))
            self._judge(f"{where}MLP: gradient of the input", self._got["d:" + at("mlp_normed")], back.dx[0], len(x),
                        back=True)  # fmt: skip
            meters.add(part.experts, back)
        self._backward += [_at(f"{where}MLP: ", finding) for finding in meters.findings()]

    def _experts(self, where: str, layer: int) -> None:
        def at(name: str) -> str:
            return named.of(layer, name)

        model = self._spec.experts
        assert model is not None
        trained = [name for name in (named.GATE, *named.ROUTED, *named.SHARED) if at(name) in self._given]
        given = {name: self._weight(at(name)) for name in trained}
        given["x_TD"], given["dy_TD"] = self._got[at("mlp_normed")], self._got["d:" + at("mlp")]
        for name, coefficient in (("daux", model.balance_coefficient), ("dz", model.z_coefficient)):
            given[name] = np.asarray(coefficient or 0.0, np.float32)
        fields = ("logits_TE", "scores_TE", "experts_TK", "weights_TK", "aux_loss", "z_loss")
        got = {name: self._got[at(name)] for name in fields}
        got |= {"y_TD": self._got[at("mlp")], "dx_TD": self._got["d:" + at("mlp_normed")]}
        got |= {f"d{name}": self._weight_gradient(at(name)) for name in trained}
        found = judge_layer(given, got, model, self._p, self._contract, backward=True)
        self._forward += [_at(f"{where}experts: ", finding) for finding in found]

    def _head(self) -> None:
        got, spec = self._got, self._spec
        if not spec.norm_head:
            self._linear("the head", "normed", named.HEAD, "logits")
            return
        inside = NormHead(got["normed"], self._weight(named.HEAD), self._dtype, self._rule)
        dx, dweight = inside.backward(got["d:logits"], through_norm=False)
        rows, columns = got["normed"].shape
        self._judge("the head", got["logits"], inside.logits, rows)
        self._judge("the head: gradient of the weight", self._weight_gradient(named.HEAD), dweight, columns, back=True)
        self._judge("the head: gradient of the input", got["d:normed"], dx, rows, back=True)

    def _losses(self) -> None:
        got, spec = self._got, self._spec
        entropy, gradient = cross_entropy(got["logits"], self._given["targets_BL"].reshape(-1), IGNORED, 0.0)
        self._forward.append(judge("cross-entropy", got["entropy"], entropy))
        self._local("gradient of the logits", got["d:logits"], gradient, len(got["logits"]), back=True)
        terms = [float(got["entropy"])]
        if spec.experts is not None:
            for name, coefficient in (
                ("aux_loss", spec.experts.balance_coefficient), ("z_loss", spec.experts.z_coefficient),
            ):  # fmt: skip
                terms += [(coefficient or 0.0) * float(got[named.of(n, name)]) for n in range(spec.layers)]
        # A constant, a product and at most as many sums as there are terms.
        bound = (2 + len(terms)) * U32 * sum(map(abs, terms)) if len(terms) > 1 else 0.0
        total = Bounded.deterministic(np.asarray(sum(terms)), np.asarray(bound))
        self._forward.append(judge("total loss", got["total"], total))

    def _embedding_backward(self) -> None:
        """The gradient of a token's row is the sum, in float32, over the places where it stands."""
        dx = wide(self._got["d:x"])
        total, absolute = np.zeros((2, *self._given[named.EMBEDDING].shape))
        np.add.at(total, self._tokens, dx)
        np.add.at(absolute, self._tokens, np.abs(dx))
        count = np.bincount(self._tokens, minlength=len(total))[:, None]
        expected = Bounded.deterministic(total, np.maximum(count - 1, 0) * U32 * absolute)
        self._backward.append(judge("gradient of the embedding", self._got[f"raw/{named.EMBEDDING}"], expected))


def _at(where: str, finding: Finding) -> Finding:
    """Say where something was found."""
    return replace(finding, detail=where + finding.detail) if finding.detail else finding
