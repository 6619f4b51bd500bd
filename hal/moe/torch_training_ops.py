# SPDX-License-Identifier: Apache-2.0
"""The portable implementation of `TrainingOps`: torch's own operators, so that a device's kernels are what is tested.

Legend: T tokens (queries), S keys, D model dim, V vocabulary, H query heads, G key heads, d width of a head, e width of
a value, R rotated channels, L width of the latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from hal import torch_kernels
from hal.errors import ShapeError
from hal.moe.checks import as_index, check_floating, check_range, check_same_device, check_same_dtype, check_shape
from hal.moe.precision import model_dtype, wide_dtype, without_autocast
from hal.moe.training_ops import NORM_HEAD_EPSILON, TrainingOps

_MATH: int = SDPBackend.MATH.value
"""What torch calls its fallback."""


class TorchTrainingOps(TrainingOps):
    """`TrainingOps` on every device that torch can address; stateless, so one instance serves all threads.

    Args:
        check_indices: check the targets' values, for which the host waits for the device once.
    """

    def __init__(self, *, check_indices: bool = True) -> None:
        self._check_indices = check_indices

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        _check_norm("rms_norm", x_TD, weight_D=weight_D)
        with without_autocast(x_TD):
            return F.rms_norm(x_TD, (x_TD.shape[1],), weight_D, eps)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        _check_norm("layer_norm", x_TD, weight_D=weight_D, bias_D=bias_D)
        # In float32 throughout: torch 2.13's CPU kernel for 16-bit tensors adds up the gradients in 16 bits.
        wide = wide_dtype(x_TD.dtype)
        with without_autocast(x_TD):
            y = F.layer_norm(x_TD.to(wide), (x_TD.shape[1],), weight_D.to(wide), bias_D.to(wide), eps)
            return y.to(x_TD.dtype)

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        where = "rotary"
        check_shape(where, "x_THd", x_THd, ("T", "H", "d"))
        check_floating(where, "x_THd", x_THd)
        check_shape(where, "cos_TR", cos_TR, (x_THd.shape[0], "R"))
        check_shape(where, "sin_TR", sin_TR, tuple(cos_TR.shape))
        rotated, wide = cos_TR.shape[1], wide_dtype(x_THd.dtype)
        if rotated % 2 or rotated > x_THd.shape[2]:
            raise ShapeError(f"{where}: R is {rotated}", expected=f"an even number of at most {x_THd.shape[2]}")
        for name, table in (("cos_TR", cos_TR), ("sin_TR", sin_TR)):
            if table.dtype != wide:
                raise ShapeError(f"{where}: {name} has dtype {table.dtype}", expected=str(wide))
        check_same_device(where, x_THd=x_THd, cos_TR=cos_TR, sin_TR=sin_TR)
        x, rest = x_THd.split((rotated, x_THd.shape[2] - rotated), dim=-1)
        # One conversion: autograd would round the gradient of each, and add them in 16 bits.
        x = x.to(wide)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        y = x * cos_TR.detach()[:, None] + turned * sin_TR.detach()[:, None]
        return torch.cat((y.to(x_THd.dtype), rest), dim=-1)

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`: a kernel of the device's where torch has one, otherwise float32 products.

        There is none that hides keys behind a prefix (1 < T < S): those take T S logits of each head.

        On the CPU in float32 whatever the dtype, rounded once; on a simulated device as its fused kernel does.
        """
        where = "attention"
        check_shape(where, "q_THd", q_THd, ("T", "H", "d"))
        check_floating(where, "q_THd", q_THd)
        check_shape(where, "k_SGd", k_SGd, ("S", "G", q_THd.shape[2]))
        check_shape(where, "v_SGe", v_SGe, (*k_SGd.shape[:2], "e"))
        for name, tensor in (("k_SGd", k_SGd), ("v_SGe", v_SGe)):
            check_same_dtype(where, "q_THd", q_THd, name, tensor)
        check_same_device(where, q_THd=q_THd, k_SGd=k_SGd, v_SGe=v_SGe)
        (queries, heads, _), (keys, groups, _) = q_THd.shape, k_SGd.shape
        if groups == 0 or heads % groups:
            raise ShapeError(f"{where}: {heads} query heads and {groups} key heads", expected="a multiple of them")
        if keys < (queries if causal else min(queries, 1)):
            raise ShapeError(f"{where}: {queries} queries and {keys} keys", expected="a key for every query to see")
        dtype = model_dtype(q_THd)
        # torch 2.13's CPU kernel rounds the gradients of k and v to 16 bits after every block of queries.
        on_cpu = q_THd.device.type == "cpu" and not torch_kernels.simulating
        wide = wide_dtype(dtype) if on_cpu else dtype
        q, k, v = (x.to(dtype).to(wide).transpose(0, 1)[None] for x in (q_THd, k_SGd, v_SGe))
        # The last query sees every key. Others behind a prefix would need a mask, since torch's own flag puts the first
        # query beside the first key; and its kernels add a mask, so that a hidden key of NaN would reach every query.
        causal = causal and queries > 1
        masked = causal and queries < keys
        with without_autocast(q_THd):
            if masked or not _has_fused_kernel(q, k, v, causal, scale, groups != heads):
                return _attention(q[0], k[0], v[0], scale, causal).transpose(0, 1).to(dtype)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups != heads)
        return y[0].transpose(0, 1).to(dtype)

    def latent_attention(
        self,
        q_THd: Tensor,
        q_THR: Tensor,
        latent_SL: Tensor,
        k_SR: Tensor,
        up_k_HdL: Tensor,
        up_v_HeL: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> Tensor:
        """See `TrainingOps.latent_attention`."""
        where = "latent_attention"
        check_shape(where, "q_THd", q_THd, ("T", "H", "d"))
        check_floating(where, "q_THd", q_THd)
        queries, heads, width = q_THd.shape
        check_shape(where, "q_THR", q_THR, (queries, heads, "R"))
        check_shape(where, "latent_SL", latent_SL, ("S", "L"))
        check_shape(where, "k_SR", k_SR, (latent_SL.shape[0], q_THR.shape[2]))
        check_shape(where, "up_k_HdL", up_k_HdL, (heads, width, latent_SL.shape[1]))
        check_shape(where, "up_v_HeL", up_v_HeL, (heads, "e", latent_SL.shape[1]))
        given = {"q_THR": q_THR, "latent_SL": latent_SL, "k_SR": k_SR, "up_k_HdL": up_k_HdL, "up_v_HeL": up_v_HeL}
        for name, tensor in given.items():
            check_same_dtype(where, "q_THd", q_THd, name, tensor)
        check_same_device(where, q_THd=q_THd, **given)
        keys = latent_SL.shape[0]
        k, v = (F.linear(latent_SL, up.flatten(0, 1)).view(keys, heads, up.shape[1]) for up in (up_k_HdL, up_v_HeL))
        rotated = k_SR[:, None].expand(-1, heads, -1).to(k.dtype)
        q = torch.cat((q_THd, q_THR), dim=-1).to(k.dtype)
        return self.attention(q, torch.cat((k, rotated), dim=-1), v, scale, causal=causal)

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        where = "norm_head"
        check_shape(where, "x_TD", x_TD, ("T", "D"))
        check_floating(where, "x_TD", x_TD)
        check_shape(where, "weight_VD", weight_VD, ("V", x_TD.shape[1]))
        check_same_dtype(where, "x_TD", x_TD, "weight_VD", weight_VD)
        check_same_device(where, x_TD=x_TD, weight_VD=weight_VD)
        if not train:
            x_TD, weight_VD = x_TD.detach(), weight_VD.detach()
        dtype = model_dtype(x_TD)
        with without_autocast(x_TD):
            wide_VD = weight_VD.to(wide_dtype(weight_VD.dtype))
            norm_1D = torch.linalg.vector_norm(wide_VD if through_norm else wide_VD.detach(), dim=0, keepdim=True)
            normal_VD = (wide_VD / (norm_1D + NORM_HEAD_EPSILON)).to(dtype)
            return F.linear(x_TD.to(dtype), normal_VD)

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        where = "cross_entropy"
        check_shape(where, "logits_TV", logits_TV, ("T", "V"))
        check_floating(where, "logits_TV", logits_TV)
        check_shape(where, "targets_T", targets_T, (logits_TV.shape[0],))
        targets_T = as_index(where, "targets_T", targets_T)
        check_same_device(where, logits_TV=logits_TV, targets_T=targets_T)
        counts_T = targets_T != ignore_index
        if self._check_indices:
            check_range(where, "targets_T", targets_T[counts_T], logits_TV.shape[1])
        with without_autocast(logits_TV):
            wide_TV = logits_TV.to(wide_dtype(logits_TV.dtype))
            number = counts_T.sum().clamp(min=1)
            loss = F.cross_entropy(wide_TV, targets_T, ignore_index=ignore_index, reduction="sum")
            if z_coefficient:
                squares_T = wide_TV.logsumexp(dim=-1).square()
                loss = loss + z_coefficient * torch.where(counts_T, squares_T, 0.0).sum()
            return loss / number


def _has_fused_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, grouped: bool) -> bool:
    """Tell whether torch has a kernel of this device's for these arguments.

    Without one it falls back to products that may store the logits in 16 bits, and to a mask that is added, so that a
    hidden key of NaN shows.
    """
    if q.device.type == "cpu" and torch_kernels.simulating:
        return q.numel() > 0
    choose = getattr(torch, "_fused_sdp_choice", None)  # what scaled_dot_product_attention itself asks
    if choose is None or q.numel() == 0:
        return False
    try:
        chosen: int = choose(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=grouped)
    except (RuntimeError, TypeError):  # a device or a version that has no such choice
        return False
    return chosen != _MATH


def _attention(q_HTd: Tensor, k_GSd: Tensor, v_GSe: Tensor, scale: float, causal: bool) -> Tensor:
    """Return attention from products and a softmax in float32, [H, T, e] in the dtype of `q_HTd`."""
    (heads, queries, inner), (groups, keys, width) = q_HTd.shape, v_GSe.shape
    wide = wide_dtype(q_HTd.dtype)
    q = q_HTd.to(wide).reshape(groups, heads // groups * queries, inner)
    logits = (q @ k_GSd.to(wide).transpose(1, 2) * scale).view(groups, heads // groups, queries, keys)
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
        logits = logits.masked_fill(hidden, -torch.inf)
    weights = logits.softmax(dim=-1).reshape(groups, heads // groups * queries, keys)
    return (weights @ v_GSe.to(wide)).view(heads, queries, width).to(q_HTd.dtype)


def _check_norm(where: str, x_TD: Tensor, **parameters: Tensor) -> None:
    check_shape(where, "x_TD", x_TD, ("T", "D"))
    check_floating(where, "x_TD", x_TD)
    for name, parameter in parameters.items():
        check_shape(where, name, parameter, (x_TD.shape[1],))
        check_same_dtype(where, "x_TD", x_TD, name, parameter)
    check_same_device(where, x_TD=x_TD, **parameters)


torch_training_ops = TorchTrainingOps()
"""The instance that everything uses unless told otherwise."""
