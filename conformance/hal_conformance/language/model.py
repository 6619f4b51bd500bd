# SPDX-License-Identifier: Apache-2.0
"""The model's equations, on the operators of an implementation under test.

What the operators do not cover is torch's own on the device: the embedding, the products of attention, and additions.
Parameters are float32; each is rounded to the dtype of the arithmetic where it is used, as mixed-precision training
does it, and its gradient comes back in float32.

Legend: B sequences, L tokens of a sequence, T = B L, D model dim, H query heads, G key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hal_conformance.case import Array
from hal_conformance.language import parameters as named
from hal_conformance.language.spec import LanguageSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Tap = Callable[[str, "Tensor"], "Tensor"]
"""Sees the tensors inside the model, each under a name; returns what the model goes on with."""


def unseen(_name: str, tensor: Tensor) -> Tensor:
    """Let a tensor pass."""
    return tensor


class Losses(NamedTuple):
    """What a forward pass gives.

    Attributes:
        total: what is trained: the cross-entropy, and the router's losses times their coefficients.
        entropy: the cross-entropy, the mean over all tokens.
        loads: for each block with experts, the choice of every token [T, K].
    """

    total: Tensor
    entropy: Tensor
    loads: list[Tensor]


def complete(ops: Any) -> Any:
    """Return an implementation that has every operator: its own, and the portable one's where it has none."""
    from hal_conformance.portable import Portable, portable  # it imports torch, which judging does without

    return Portable(ops, portable)


def rotary_table(length: int, width: int, theta: float) -> tuple[Array, Array]:
    """Return cos and sin [L, d] of positions 0 to L - 1, both halves alike, float32: the same bits on every host.

    No host's cosine is asked: the angles of one position are at most 1, where twelve terms of the series are exact to
    float64, and position n is n rotations by them. The frequencies are rounded to float32, as most models have them.
    """
    frequency = np.float32(theta ** (-np.arange(0, width, 2) / width)).astype(np.float64)
    square = frequency * frequency
    cos, sin, term = np.ones_like(frequency), frequency.copy(), np.ones_like(frequency)
    for n in range(1, 13):
        term = -term * square / (2 * n * (2 * n - 1))
        cos = cos + term
        sin = sin + term * frequency / (2 * n + 1)
    rows = [(np.ones_like(cos), np.zeros_like(cos))]
    for _ in range(length - 1):
        c, s = rows[-1]
        rows.append((c * cos - s * sin, s * cos + c * sin))
    both = (np.tile(np.stack(half), (1, 2)).astype(np.float32) for half in zip(*rows, strict=True))
    return next(both), next(both)


def losses(
    ops: Any,
    parameters: Mapping[str, Tensor],
    spec: LanguageSpec,
    tokens_BL: Tensor,
    targets_BL: Tensor,
    table: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    tap: Tap = unseen,
) -> Losses:
    """Return the losses of a batch.

    Args:
        ops: the operators; see `complete`.
        parameters: by name (`parameters.shapes`), float32.
        spec: the model.
        tokens_BL: int64.
        targets_BL: int64.
        table: of `rotary_table`, float32, on the device.
        dtype: of the arithmetic.
        tap: sees what is inside.
    """
    import torch.nn.functional as F

    def weight(name: str) -> Tensor:
        return parameters[name].to(dtype)

    x = tap("x", F.embedding(tokens_BL.reshape(-1), parameters[named.EMBEDDING]).to(dtype))
    total: Tensor | None = None
    loads = []
    for layer in range(spec.layers):

        def seen(name: str, tensor: Tensor, at: int = layer) -> Tensor:
            return tap(named.of(at, name), tensor)

        block = {name: named.of(layer, name) for name in (*_ATTENTION, named.GATE, *named.ROUTED, *named.SHARED)}
        n = ops.rms_norm(seen("attention_in", x.view_as(x)), weight(block[named.ATTENTION_NORM]), spec.eps)
        qkv = seen("qkv", F.linear(seen("attention_normed", n), weight(block[named.PROJECTION])))
        a = seen("attention", _attention(ops, qkv, spec, tokens_BL.shape, table, seen))
        x = seen("h", x + seen("attention_out", F.linear(a, weight(block[named.OUTPUT]))))
        n = seen("mlp_normed", ops.rms_norm(seen("mlp_in", x.view_as(x)), weight(block[named.MLP_NORM]), spec.eps))
        if spec.experts is None:
            y = _dense(ops, n, [weight(block[name]) for name in named.ROUTED])
        else:
            y, chosen, more = _experts(ops, n, spec, {k: weight(v) for k, v in block.items() if v in parameters}, seen)
            loads.append(chosen)
            total = more if total is None else total + more
        x = seen("out", x + seen("mlp", y))
    n = tap("normed", ops.rms_norm(x, weight(named.NORM), spec.eps))
    if spec.norm_head:
        logits = ops.norm_head(n, weight(named.HEAD), train=True, through_norm=False)
    else:
        logits = F.linear(n, weight(named.HEAD))
    entropy = tap("entropy", ops.cross_entropy(tap("logits", logits), targets_BL.reshape(-1)))
    return Losses(tap("total", entropy if total is None else entropy + total), entropy, loads)


_ATTENTION = (named.ATTENTION_NORM, named.PROJECTION, named.OUTPUT, named.MLP_NORM)


def _attention(
    ops: Any, qkv_TP: Tensor, spec: LanguageSpec, sizes: tuple[int, ...], table: tuple[Tensor, Tensor], tap: Tap
) -> Tensor:
    """Return [T, H d]: each sequence by itself, positions from 0."""
    import torch

    h, g, d = spec.heads, spec.key_heads, spec.head_width
    every = []
    for at, qkv in enumerate(qkv_TP.view(*sizes, -1).unbind(0)):
        q, k, v = (part.view(len(qkv), -1, d) for part in qkv.split((h * d, g * d, g * d), dim=1))
        q, k, v = tap(f"q{at}", q), tap(f"k{at}", k), tap(f"v{at}", v)
        q, k = (tap(f"{name}{at}", ops.rotary(part, *table)) for name, part in (("rq", q), ("rk", k)))
        every.append(tap(f"a{at}", ops.attention(q, k, v, d**-0.5, causal=True)).flatten(1))
    return torch.cat(every)


def _dense(ops: Any, x_TD: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the MLP's result: an expert that every token visits."""
    import torch

    from hal.moe.ops import ExpertWeights

    counts = torch.tensor([len(x_TD)], device=x_TD.device)
    y: Tensor = ops.experts(x_TD, counts, ExpertWeights(*weights))
    return y


def _experts(
    ops: Any, x_TD: Tensor, spec: LanguageSpec, weights: Mapping[str, Tensor], tap: Tap
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the chosen experts, and the router's losses times their coefficients."""
    from hal.moe.ops import ExpertWeights, LayerWeights, SharedWeights

    model = spec.experts
    assert model is not None
    shared = SharedWeights(*(weights[name] for name in named.SHARED)) if named.SHARED[0] in weights else None
    out = ops.layer(
        x_TD,
        LayerWeights(weights[named.GATE], None, ExpertWeights(*(weights[name] for name in named.ROUTED)), shared),
        model,
    )
    for name, tensor in out.routing._asdict().items():
        tap(name, tensor)
    aux, z = tap("aux_loss", out.aux_loss), tap("z_loss", out.z_loss)
    return out.y_TD, out.routing.experts_TK, (model.balance_coefficient or 0.0) * aux + (model.z_coefficient or 0.0) * z
