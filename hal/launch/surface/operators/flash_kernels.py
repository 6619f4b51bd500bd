# SPDX-License-Identifier: Apache-2.0
"""torch's operators of flash attention, which CUDA alone has: `varlen_attn` calls them, and libraries do by name.

Each sequence is computed in the plain form, in float32, and counted as a fallback.
Legend: T queries, S keys of one sequence, H heads, G heads of keys, d channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hal.launch.patches import Patches
from hal.launch.redirection import Redirection
from hal.torch_kernels import add_kernel

if TYPE_CHECKING:
    import torch


def install(redirection: Redirection, patches: Patches) -> None:
    """Register kernels for a CPU; other devices' plug-ins bring their own."""
    import torch

    if redirection.hosts is None:
        return
    library = torch.library.Library("aten", "IMPL")
    patches.on_undo(library._destroy)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _fall_back(redirection, "torch.ops.aten._flash_attention_forward", q, k, v)
        out, lse = _forward(redirection, q, k, v, *args, **kwargs)
        nothing = q.new_empty(0)
        return out, lse, nothing.to(torch.uint64).new_zeros(2), nothing, nothing

    def into(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _fall_back(redirection, "torch.ops.aten._flash_attention_forward_no_dropout_inplace", q, k, v)
        found, lse = _forward(redirection, q, k, v, *args, **kwargs)
        out.copy_(found)
        return lse

    def backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        _fall_back(redirection, "torch.ops.aten._flash_attention_backward", grad, q, k, v)
        return _backward(redirection, grad, q, k, v, *args, **kwargs)

    for name, kernel in (("_flash_attention_forward", forward), ("_flash_attention_backward", backward),
                         ("_flash_attention_forward_no_dropout_inplace", into)):  # fmt: skip
        add_kernel(library, name, "CPU", kernel)


def visible(
    t: int, s: int, left: int | None, right: int | None, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Return which of S keys each of T queries sees, bool [T, S]; None: all.

    Query i's own key is i + S - T: the last query and the last key belong together, as in flash-attn.

    Args:
        t, s: numbers of queries and keys.
        left: how many keys before its own a query sees; None or negative: all.
        right: how many after it, likewise.
        causal: none after it.
        device: of the result.
    """
    import torch

    left = -1 if left is None else left
    right = 0 if causal else -1 if right is None else right
    if left < 0 and right < 0:
        return None
    distance = torch.arange(s, device=device)[None] - torch.arange(t, device=device)[:, None] - (s - t)
    seen = torch.ones(t, s, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def _fall_back(redirection: Redirection, name: str, *given: torch.Tensor) -> None:
    redirection.fallback(name, "in the plain form, in float32", sum(tensor.nbytes for tensor in given))


def _forward(
    redirection: Redirection, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cum_q: torch.Tensor | None,
    cum_k: torch.Tensor | None, max_q: int, max_k: int, dropout: float, causal: bool, debug: bool, *,
    scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None, alibi_slopes: Any = None, block_table: Any = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the result, as the queries, and the logarithm of each query's normaliser, float32 [H, all T] or [B, H, T].

    Raises:
        UnsupportedOperation: for a dropout, ALiBi and paged keys.
    """
    import torch

    unmatched = ((dropout, "dropout"), (alibi_slopes is not None, "ALiBi"), (block_table is not None, "paged keys"))
    for given, what in unmatched:
        if given:
            raise redirection.refuse("torch.ops.aten._flash_attention_forward", f"{what} has no equivalent here")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_zeros(q.shape[:-1] + v.shape[-1:])
    lse = torch.full(_of_normalisers(q), torch.inf, device=q.device)  # of a query that sees no key, as there
    parts = zip(_sequences(cum_q, cum_k, q, k, v, out, used=seqused_k), _sequences(cum_q, None, lse.mT), strict=True)
    for (q_1, k_1, v_1, out_1), (lse_1,) in parts:
        logits, seen = _logits(q_1, k_1, scale, window_size_left, window_size_right, causal)
        found = logits.logsumexp(-1)
        weights = (logits - found[..., None]).exp()
        if seen is not None:
            found, weights = found.where(seen.any(1), torch.inf), weights.where(seen, 0)
        out_1.copy_(torch.einsum("hts,shd->thd", weights, _spread(v_1, q_1)))
        lse_1.copy_(found.mT)
    return out, lse


def _backward(
    redirection: Redirection, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, cum_q: torch.Tensor | None, cum_k: torch.Tensor | None, max_q: int,
    max_k: int, dropout: float, causal: bool, rng_state: Any, unused: Any, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of queries, keys and values, from each query's normaliser."""
    import torch

    if dropout:
        raise redirection.refuse("torch.ops.aten._flash_attention_backward", "dropout has no equivalent here")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    inputs = _sequences(cum_q, cum_k, q, k, v, grad, out)
    outputs = _sequences(cum_q, cum_k, grads[0], grads[1], grads[2])
    for (q_1, k_1, v_1, grad_1, out_1), made, (lse_1,) in zip(
        inputs, outputs, _sequences(cum_q, None, lse.mT), strict=True
    ):
        logits, seen = _logits(q_1, k_1, scale, window_size_left, window_size_right, causal)
        weights = (logits - lse_1.mT[..., None]).exp()
        if seen is not None:
            weights = weights.where(seen, 0)
        grad_1, out_1 = grad_1.float(), out_1.float()
        through = torch.einsum("thd,shd->hts", grad_1, _spread(v_1, q_1)) - (grad_1 * out_1).sum(-1).mT[..., None]
        inner = weights * through * scale
        made[0].copy_(torch.einsum("hts,shd->thd", inner, _spread(k_1, q_1)))
        made[1].copy_(_gathered(torch.einsum("hts,thd->shd", inner, q_1.float()), k_1))
        made[2].copy_(_gathered(torch.einsum("hts,thd->shd", weights, grad_1), v_1))
    return grads


def _of_normalisers(q: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the normalisers: heads first, then queries."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _sequences(
    cum_q: torch.Tensor | None, cum_k: torch.Tensor | None, *tensors: torch.Tensor, used: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield for each sequence its part of each tensor: the second and third are of keys, all others of queries.

    Args:
        cum_q: where each packed sequence begins, and the end; None: each of a batch is one.
        cum_k: of the keys; None: `cum_q`, or there are none.
        tensors: [all positions, ...] or [B, positions, ...].
        used: how many keys of each sequence there really are; None: all.
    """
    if cum_q is None:
        for index in range(tensors[0].shape[0]):
            yield tuple(tensor[index, : int(used[index])] if used is not None and at in (1, 2) else tensor[index]
                        for at, tensor in enumerate(tensors))  # fmt: skip
        return
    of_q, of_k = cum_q.tolist(), (cum_q if cum_k is None else cum_k).tolist()
    for index in range(len(of_q) - 1):
        rows, end = slice(of_q[index], of_q[index + 1]), of_k[index + 1]
        if used is not None:
            end = of_k[index] + int(used[index])
        keys = slice(of_k[index], end)
        yield tuple(tensor[keys if at in (1, 2) else rows] for at, tensor in enumerate(tensors))


def _logits(
    q: torch.Tensor, k: torch.Tensor, scale: float, left: int | None, right: int | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return float32 logits [H, T, S], -inf where a query sees no key, and which it sees."""
    import torch

    logits = torch.einsum("thd,shd->hts", q.float(), _spread(k, q)) * scale
    seen = visible(q.shape[0], k.shape[0], left, right, causal, q.device)
    return (logits if seen is None else logits.where(seen, -torch.inf)), seen


def _spread(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return [S, G, d] for each head of the queries, float32 [S, H, d]."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _gathered(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of [S, G, d] from that of its heads, [S, H, d]."""
    gathered: torch.Tensor = grad.unflatten(1, (x.shape[1], -1)).sum(2)
    return gathered
