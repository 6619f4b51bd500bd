# SPDX-License-Identifier: Apache-2.0
"""Attention as a card's fused kernel computes it, of products on the simulated unit (arXiv:2307.08691).

Scores are the accumulator's, scaled in float32. Forward, exp(s - max) is rounded to the operands' dtype, multiplied by
v, and divided by its sum in float32 afterwards. Backward, P = exp(s - logsumexp) and dS = P (dP - D) are. What is not
simulated is the order of a kernel's blocks of keys: here one block holds all of them.

Legend: B batches, H heads, M queries, N keys, D channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import pad

from hal_sim.simulation import Simulation


def chosen(
    simulation: Simulation | None, whole: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Compute attention by our fused kernel, also where a CPU has none and takes the "math" form.

    That form computes 16-bit attention in float32: so does a card's where it is asked for by name, and is left alone;
    where a card has a fused kernel and we have none, it is counted.

    Args:
        simulation: None: torch computes.
        whole: `torch.ops.aten.scaled_dot_product_attention.default`, whose other arguments follow.
    """
    given = q, k, v, attn_mask, dropout_p, is_causal
    fused = simulation is not None and _is_for_fused_kernels(q, k, v, attn_mask, enable_gqa)
    learns = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if simulation is not None and fused and (0 < dropout_p <= 1 or learns):
        if q.element_size() == 2:
            what = "dropout" if dropout_p else "a mask that learns"
            simulation.count(f"scaled_dot_product_attention with {what}", given)
        fused = False
    if not fused or not 0 <= dropout_p <= 1:  # torch knows what to refuse
        return whole.decompose(*given, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    scale, width = _scale(q, scale), v.shape[-1]
    if q.ndim == 3:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    # One width for all, since what compiles code knows the kernel so: products with zeros change no bit.
    q, k, v = (pad(x, (0, max(q.shape[-1], width) - x.shape[-1])) for x in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: torch.Tensor = kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0][..., :width]
    return y if given[0].ndim == 4 else y.squeeze(0)


def _is_for_fused_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, enable_gqa: bool
) -> bool:
    """Tell whether a card's fused kernels take this, one of them is switched on, and torch refuses nothing of it."""
    switches = torch.backends.cuda
    enabled = switches.flash_sdp_enabled() or switches.mem_efficient_sdp_enabled() or switches.cudnn_sdp_enabled()
    if not enabled or not q.is_floating_point() or q.element_size() == 1 or not q.dtype == k.dtype == v.dtype:
        return False
    if not all(x.ndim == q.ndim and x.ndim in (3, 4) and x.numel() for x in (q, k, v)):
        return False
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or q.shape[:-3] != k.shape[:-3]:
        return False
    heads, shared = q.shape[-3], k.shape[-3]
    if k.shape[:-2] != v.shape[:-2] or not (heads == shared or (enable_gqa and heads % shared == 0)):
        return False
    return mask is None or (1 < mask.ndim <= q.ndim and mask.dtype in (torch.bool, torch.float32, q.dtype))


def forward(
    simulation: Simulation, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0,
    is_causal: bool = False, *, attn_mask: torch.Tensor | None = None, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return attention [B, H, M, D] and the logarithm of each row's sum [B, H, M], without dropout.

    Args:
        simulation: whose unit.
        q: [B, H, M, D].
        k: [B, H, N, D]; or fewer heads, each of which serves several of q's.
        v: [B, H, N, D]; the same.
        dropout_p: 0, of torch's kernel of that name, too.
        is_causal: query i sees keys 0 to i.
        attn_mask: what is added to the scores, or which are seen; None: all.
        scale: of the scores; None: 1 / sqrt(D).

    Raises:
        RuntimeError: there is dropout, which torch's kernel of that name has not, either.
    """
    if dropout_p:
        raise RuntimeError("scaled_dot_product_attention_flash_attention: dropout is not supported")
    scores = _scores(simulation, q, k, is_causal, attn_mask, scale)
    largest = scores.amax(-1, keepdim=True)
    p = (scores - largest.masked_fill(largest == -math.inf, 0)).exp()
    sums = p.sum(-1, keepdim=True)
    y = _product(simulation, p.to(v.dtype), _spread(v, q))
    # A query that sees no key has no attention.
    y = torch.where(sums == 0, 0, y / sums).to(q.dtype)
    logsumexp = (largest + sums.log()).squeeze(-1)
    return torch.empty_like(q).copy_(y), logsumexp.transpose(1, 2).contiguous().transpose(1, 2)


def backward(
    simulation: Simulation, dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
    logsumexp: torch.Tensor, dropout_p: float, is_causal: bool, *, attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of q, k and v; see `forward` for what is given."""
    scores = _scores(simulation, q, k, is_causal, attn_mask, scale)
    p = (scores - logsumexp.masked_fill(logsumexp == -math.inf, 0)[..., None]).exp()
    dv = _product(simulation, p.to(q.dtype).mT, dy)
    dp = _product(simulation, dy, _spread(v, q).mT)
    delta = (dy.to(p.dtype) * y.to(p.dtype)).sum(-1, keepdim=True)
    ds = (p * (dp - delta)).to(q.dtype)
    factor = _scale(q, scale)
    dq, dk = _product(simulation, ds, _spread(k, q)) * factor, _product(simulation, ds.mT, q) * factor
    return _rows_last(dq.to(q.dtype)), _rows_last(_gathered(dk, k)), _rows_last(_gathered(dv, v))


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _scores(
    simulation: Simulation, q: torch.Tensor, k: torch.Tensor, is_causal: bool, mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    scores = _product(simulation, q, _spread(k, q).mT) * _scale(q, scale)
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def _product(simulation: Simulation, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the products of [B, H, ...] matrices in the accumulator's format."""
    found = simulation.product(a.flatten(0, 1), b.flatten(0, 1))
    return found.view(*a.shape[:2], *found.shape[1:])


def _spread(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return keys or values with a head for each of the queries'."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _gathered(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of keys or values whose heads were spread: the sum of each one's, rounded once."""
    B, H, N, D = x.shape
    return gradient.view(B, H, -1, N, D).sum(2).to(x.dtype)


def _rows_last(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient that lies in memory as torch's own does: batch, row, head, channel."""
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)
