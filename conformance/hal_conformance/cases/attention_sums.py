# SPDX-License-Identifier: Apache-2.0
"""Attention whose sums cancel: what is kept in 16 bits between two blocks of keys or queries is what remains."""

from __future__ import annotations

import dataclasses

import numpy as np

from hal.contract import Arithmetic, Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Params, arithmetic
from hal_conformance.cases.attention import BOUND, Attention, Forward, Sizes
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import judge, merge
from hal_conformance.verdicts import Judgement


@dataclasses.dataclass(frozen=True)
class Cancels(Attention):
    """Integers, of which the second half of keys and of queries takes back what the first one gave.

    Attributes:
        queries: how many; even.
        keys: how many; a power of two.
    """

    queries: int = 256
    keys: int = 256

    HEADS = 4
    WIDTH = 16

    def sizes(self, p: Params) -> Sizes:
        """See `Attention.sizes`."""
        return Sizes(self.queries, self.keys, self.HEADS, self.HEADS // self.share, self.WIDTH)

    def scale(self, p: Params) -> float:
        """See `Attention.scale`: a power of two, and its root is one, too, which some multiply q and k with."""
        return 0.25

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: no channel of a query is one of a key, so that every logit is 0 and p is 1 / S.

        Half of a value's channels have an upstream gradient dy. A key has a power of two in one of these, and its
        opposite in the other half of the keys: y is 0 there and D as well, so that dS = dy v / S has the bits of dy.
        The other channels add up to S times a small integer, y. Everything is positive in the first half, so that a
        sum grows beyond 11 bits; the other half takes it back, but for what the first key and the first query change:

            dq = dS_0 / 4,    dk = (dS_0 + (q_0 - 1) v / S) / 4,    dv = 1 / S.
        """
        s, half_keys, half = self.sizes(p), self.keys // 2, self.queries // 2
        seed, name = p.seed, "attention/cancels"

        def integers(what: str, high: int, *shape: int) -> F64:
            return make.integers(seed, f"{name}/{what}", 1, high, *shape).astype(np.float64)

        q, dy = np.zeros((s.queries, s.heads, s.width)), np.zeros((s.queries, s.heads, self.WIDTH))
        k, v = np.zeros((s.keys, s.groups, s.width)), np.zeros((s.keys, s.groups, self.WIDTH))
        middle, seen = s.width // 2, self.WIDTH // 2
        q[:half, :, :middle] = integers("q", 15, half, s.heads, middle)
        q[half:] = q[:half]
        q[half, :, :middle] -= 1.0
        dy[:half, :, :seen] = integers("dy", 63, half, s.heads, seen)
        dy[half:] = -dy[:half]
        dy[half, :, :seen] += 1.0
        k[:half_keys, :, middle:] = integers("k", 15, half_keys, s.groups, middle)
        k[half_keys:] = k[:half_keys]
        k[half_keys, :, middle:] -= 1.0
        sizes = 2.0 ** make.integers(seed, f"{name}/v", 0, 2, half_keys, s.groups)
        channel = make.integers(seed, f"{name}/channel", 0, seen - 1, half_keys, s.groups)
        v[:half_keys, :, :seen] = sizes[..., None] * (channel[..., None] == np.arange(seen))
        v[:half_keys, :, seen:] = integers("y", 63, half_keys, s.groups, seen)
        twice = 2.0 * integers("mean", 3, s.groups, seen)
        v[half_keys:, :, :seen] = -v[:half_keys, :, :seen]
        v[half_keys:, :, seen:] = twice - v[:half_keys, :, seen:]
        arrays = {"q_THd": q, "k_SGd": k, "v_SGe": v, "dy_THe": dy}
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the last store, and what any order of float32 arithmetic may lose of absolute sums."""
        wrong = self.structure(inputs, outputs, p)
        wanted = self.results(inputs, p, arithmetic(contract, p.dtype))
        return wrong or merge(judge(name, outputs[name], want.stored(p.dtype)) for name, want in wanted.items())

    def results(self, inputs: Arrays, p: Params, rule: Arithmetic) -> dict[str, Bounded]:
        """Return what every output is, not stored.

        What is stored in 16 bits on the way (p, dP, dS, a head's part) has as few bits, and what comes within some
        float32 roundings of it is rounded to it. So what is left of honest errors is that of float32: at most a
        rounding for each term of a sum, in any order, on partial sums that never exceed the sum of absolute terms
        (Higham 2002, section 3.1), and one more for each merging of blocks, of which there are no more than terms: the
        factors of 2. An exponential and a logarithm lose a few each (the 16). A variance would not do: the order of the
        sums is not exchangeable with the data, and errors of one block have one sign.
        """
        q, dy = (np.asarray(inputs[name], np.float64) for name in ("q_THd", "dy_THe"))
        k, v = (
            np.asarray(inputs[name], np.float64)[:, np.arange(self.HEADS) // self.share] for name in ("k_SGd", "v_SGe")
        )
        scale, keys, queries = self.scale(p), 2 * self.keys, 2 * self.queries
        of_y, of_sums = keys + 16, 2 * self.WIDTH
        roundings = {
            "y_THe": of_y, "dq_THd": of_y + of_sums + keys, "dk_SGd": of_y + of_sums + queries, "dv_SGe": of_y + queries
        }  # fmt: skip
        # Of inputs that a product cuts, each loses less than a unit of what is kept.
        cut = 0.0 if rule.input_bits is None else 4.0 * 2.0**-rule.input_bits
        value = self._products((q, k, v, dy), scale, -1.0)
        absolute = self._products((np.abs(q), np.abs(k), np.abs(v), np.abs(dy)), scale, 1.0)
        lost = {name: (n * rule.unit_roundoff + cut) * absolute[name] for name, n in roundings.items()}
        return {name: Bounded(value[name], lost[name], lost[name] ** 2) for name in value}

    def _products(self, given: tuple[F64, F64, F64, F64], scale: float, sign: float) -> dict[str, F64]:
        """Return the result and the gradients where every p is 1 / S: dS = (dP - D) / S.

        Of absolute values and with a `sign` of +1, which is -1 there, the sums of the absolute terms.
        """
        q, k, v, dy = given
        y = np.broadcast_to(v.mean(0), dy.shape)
        dot = np.einsum("the,the->ht", dy, y)[..., None]
        ds = (np.einsum("the,she->hts", dy, v) + sign * dot) / self.keys
        return {
            "y_THe": y,
            "dq_THd": scale * np.einsum("hts,shd->thd", ds, k),
            "dk_SGd": self._of_groups(scale * np.einsum("hts,thd->shd", ds, q)),
            "dv_SGe": self._of_groups(np.broadcast_to(dy.sum(0) / self.keys, v.shape)),
        }

    def _of_groups(self, gradients: F64) -> F64:
        total: F64 = gradients.reshape(len(gradients), -1, self.share, gradients.shape[2]).sum(2)
        return total


@dataclasses.dataclass(frozen=True)
class HeadsCancel(Cancels):
    """The third of four heads takes back from a key's gradients what the first one gave, between two small ones.

    What one head gives has few bits, and may be stored; the sum of the first two has 13.
    """

    queries: int = 8
    keys: int = 16
    share: int = 4

    HEADS = 8

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: as in `Cancels`, but y is 0 where dy is not, and dq is dy v_0 / (4 S)."""
        s, half_keys, middle, seen = self.sizes(p), self.keys // 2, self.WIDTH // 2, self.WIDTH // 2
        seed, name = p.seed, "attention/heads_cancel"
        q, dy = (np.zeros((s.queries, s.groups, s.heads // s.groups, self.WIDTH)) for _ in range(2))
        k, v = (np.zeros((s.keys, s.groups, self.WIDTH)) for _ in range(2))
        channel = np.arange(s.queries) % middle
        q[np.arange(s.queries), :, :, channel] = 1.0  # each query another channel: a key's gradient has the bits of dy
        small = make.integers(seed, f"{name}/dy", 1, 15, s.queries, s.groups, 2)
        dy[:, :, 1::2, :seen] = 2.0 * small[..., None] - 1.0
        dy[:, :, 0, :seen], dy[:, :, 2, :seen] = 4096.0, -4096.0
        k[:half_keys, :, middle:] = make.integers(seed, f"{name}/k", 1, 15, half_keys, s.groups, middle)
        k[half_keys:] = k[:half_keys]
        k[half_keys, :, middle:] -= 1.0
        at = make.integers(seed, f"{name}/channel", 0, seen - 1, half_keys, s.groups)
        v[:half_keys, :, :seen] = at[..., None] == np.arange(seen)
        v[half_keys:] = -v[:half_keys]
        v[:, :, seen:] = make.integers(seed, f"{name}/y", 1, 3, s.groups, seen)
        heads = {"q_THd": q.reshape(s.queries, s.heads, -1), "dy_THe": dy.reshape(s.queries, s.heads, -1)}
        arrays = {**heads, "k_SGd": k, "v_SGe": v}
        return {name: make.store(arrays[name], p.dtype) for name in ("q_THd", "k_SGd", "v_SGe", "dy_THe")}


@dataclasses.dataclass(frozen=True)
class Rises(Forward):
    """Logits grow from key to key, and values change their sign where half of the weight is reached."""

    HEADS = 4

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: those in which a factor is stored more narrowly than it is computed."""
        return ("bfloat16", "float16")

    def sizes(self, p: Params) -> Sizes:
        """See `Attention.sizes`."""
        return Sizes(16, 1536, self.HEADS, self.HEADS // self.share, 16)

    def scale(self, p: Params) -> float:
        """See `Attention.scale`."""
        return 0.3

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the maximum of every block of keys is above all before it.

        An online softmax multiplies what it has by exp(m - m') whenever the maximum grows from m to m'. Where that
        factor has the relative error u, all earlier keys have it together: y moves by u times the difference of the
        means of the earlier and of the later values, which is large beside y and its rounding, for y is near 0.
        Probabilities that are stored err each by themselves, and S of them have u / sqrt(S).
        """
        s = self.sizes(p)

        def normal(what: str, *shape: int) -> F64:
            return make.normal(p.seed, f"attention/rises/{what}", *shape)

        rise = np.linspace(-3.0, 3.0, s.keys)
        q = normal("q", s.queries, s.heads, s.width) * 0.25
        k = normal("k", s.keys, s.groups, s.width) * 0.25
        q[:, :, 0] = 2.0 + normal("slope", s.queries, s.heads) / 16.0
        k[:, :, 0] = rise[:, None]
        weight = np.cumsum(np.exp(2.0 * self.scale(p) * rise))
        sign = np.where(weight < weight[-1] / 2.0, 1.0, -1.0)
        v = sign[:, None, None] * (4.0 + normal("v", s.keys, s.groups, s.width) / 2.0)
        arrays = {"q_THd": q, "k_SGd": k, "v_SGe": v}
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: with what a sum in the order of the keys may lose, which is not exchangeable with them.

        Partial sums climb to half of sum |p v| and come back: at most a rounding of that for each key.
        """
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        want = self.result(inputs, p, contract).within_deviations()
        v = np.abs(np.asarray(inputs["v_SGe"], np.float64))
        lost = len(v) * arithmetic(contract, p.dtype).unit_roundoff * v.max() / 2.0
        bounded = Bounded(want.value, want.bound + lost, want.var + lost**2).stored(p.dtype)
        return merge([judge("y_THe", outputs["y_THe"], bounded, independent=want.value.shape[0] * self.HEADS)])


CASES = (
    Cancels(
        "attention.cancels", "attention", ("attention",),
        "Integers and logits of 0, without a mask: 256 queries over 256 keys, of which the second half takes back what "
        "the first one added. Sums reach 12 bits and more and end as small integers: results and gradients that "
        "are kept in 16 bits between two blocks differ. Bound: what is stored in 16 bits is exact, and float32 loses "
        "at most a rounding of the absolute sum for each term.",
        causal=False,
    ),
    HeadsCancel(
        "attention.heads_cancel", "attention", ("attention",),
        "As attention.cancels with 8 queries, 16 keys and four heads to a key head, of which the third takes back from "
        "the gradients of keys and values what the first one gave: they differ where they are added up in 16 bits.",
        causal=False,
    ),
    Rises(
        "attention.rises", "attention", ("attention",),
        "Logits grow by 3.6 over 1,536 keys, and the values change their sign where half of the weight is reached: the "
        "factor by which an online softmax rescales what it has is seen beside the rounding of single probabilities. "
        + BOUND + " And what a sum in the order of the keys may lose: a rounding of half of sum |p v| for each key.",
        causal=False,
    ),
)  # fmt: skip
