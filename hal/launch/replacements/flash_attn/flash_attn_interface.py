# SPDX-License-Identifier: Apache-2.0
"""The functions of flash-attn; see the package."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hal.launch.replacements.finder import refuse, stands_in
from hal.launch.surface.operators.flash_kernels import visible

_INSTEAD = "torch's attention runs in its place: other order of sums, another random mask of a dropout"


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return the attention of [B, T, H, d] to [B, S, G, d], [B, T, H, d].

    Raises:
        UnsupportedOperation: for `softcap`, `alibi_slopes` and `return_attn_probs`.
    """
    _check("flash_attn_func", softcap, alibi_slopes, return_attn_probs)
    stands_in("flash_attn.flash_attn_func", _INSTEAD)
    return _attend(q, k, v, dropout_p, softmax_scale, causal, window_size)


def flash_attn_qkvpacked_func(qkv: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `flash_attn_func`, of [B, T, 3, H, d]."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `flash_attn_func`, of [B, S, 2, G, d]."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Return the attention within each of N packed sequences.

    Args:
        q: [all queries, H, d]; `k`, `v`: [all keys, G, d].
        cu_seqlens_q: int32 [N + 1], where each sequence begins, and the end; `cu_seqlens_k` likewise.

    Raises:
        UnsupportedOperation: as `flash_attn_func`, and for `block_table`.
    """
    _check("flash_attn_varlen_func", softcap, alibi_slopes, return_attn_probs)
    if block_table is not None:
        raise refuse("flash_attn.flash_attn_varlen_func", "paged keys have no equivalent here")
    stands_in("flash_attn.flash_attn_varlen_func", _INSTEAD)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    found = []
    for i in range(len(ends_q) - 1):
        rows, columns = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        one = (q[None, rows], k[None, columns], v[None, columns])
        found.append(_attend(*one, dropout_p, softmax_scale, causal, window_size)[0])
    return torch.cat(found) if found else q.new_zeros(q.shape[:-1] + v.shape[-1:])


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """As `flash_attn_varlen_func`, of [all positions, 3, H, d]."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `flash_attn_varlen_func`, of keys and values [all keys, 2, G, d]."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None,
    v: torch.Tensor | None = None, rotary_cos: Any = None, rotary_sin: Any = None,
    cache_seqlens: int | torch.Tensor | None = None, cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: Any = None, block_table: Any = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Any = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return the attention of [B, T, H, d] to the keys in a cache, [B, T, H, d]; without gradients, as there.

    Args:
        q: queries.
        k_cache: [C, S, G, d]; `v_cache` likewise.
        k: [B, N, G, d], new keys, which are written into the cache behind those that it has; `v` likewise.
        cache_seqlens: how many keys the cache has, for all or for each of B; None: S.
        cache_batch_idx: [B], the row of the cache that each of B has; None: its own.

    Raises:
        UnsupportedOperation: as `flash_attn_func`, and for rotary embeddings, left padding and `block_table`.
    """
    _check("flash_attn_with_kvcache", softcap, alibi_slopes, return_softmax_lse)
    unmatched = (rotary_cos, "rotary embeddings"), (cache_leftpad, "left padding"), (block_table, "paged keys")
    for given, what in unmatched:
        if given is not None:
            raise refuse("flash_attn.flash_attn_with_kvcache", f"{what} have no equivalent here")
    stands_in("flash_attn.flash_attn_with_kvcache", _INSTEAD)
    batch = q.shape[0]
    held = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
    lengths = held.tolist() if isinstance(held, torch.Tensor) else [held] * batch
    places = range(batch) if cache_batch_idx is None else cache_batch_idx.tolist()
    found = []
    with torch.no_grad():
        for i, (place, length) in enumerate(zip(places, lengths, strict=True)):
            end = length
            if k is not None and v is not None:
                end += k.shape[1]
                k_cache[place, length:end], v_cache[place, length:end] = k[i], v[i]
            one = (q[i, None], k_cache[place, None, :end], v_cache[place, None, :end])
            found.append(_attend(*one, 0.0, softmax_scale, causal, window_size))
    return torch.cat(found) if found else q.new_zeros(q.shape[:-1] + v_cache.shape[-1:])


def _check(name: str, softcap: float, alibi_slopes: Any, return_attn_probs: bool) -> None:
    for given, what in ((softcap, "softcap"), (alibi_slopes is not None, "alibi_slopes"),
                        (return_attn_probs, "return_attn_probs")):  # fmt: skip
        if given:
            raise refuse(f"flash_attn.{name}", f"torch's attention has no {what}")


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, scale: float | None, causal: bool,
    window: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    t, s = q.shape[1], k.shape[1]
    left, right = window
    right = 0 if causal else right
    plain = bool((left < 0 or left >= s) and right == 0 and t == s)  # also of lengths that the compiler does not know
    mask = None if plain else visible(t, s, left, right, causal, q.device)
    if s == 0:
        return q.new_zeros(q.shape[:-1] + v.shape[-1:])
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, dropout, plain, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # fmt: skip
    if mask is not None:
        y = torch.where(mask.any(1)[None, :, None, None], y, 0)  # nothing is seen, where torch divides by 0
    return y
