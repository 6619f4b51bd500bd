# SPDX-License-Identifier: Apache-2.0
"""What surrounds the experts in training, as an interface: norms, rotary embedding, attention, the head, its loss.

Pure functions of tensors; the conformance suite checks them forward and backward. Each docstring says where a result
is rounded to the dtype of storage (a *store point*): an implementation that rounds at more places is less precise than
the contract, and one that rounds at fewer is within it.

Legend: T tokens (queries), S keys, D model dim, V vocabulary, H query heads, G key heads (G divides H), d width of a
head, e width of a value, R rotated channels, L width of the latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

NORM_HEAD_EPSILON = 1e-7
"""Added to the norm of a column of the head: `modeling_bailing_moe.py` of Ling-Lite and Ling-Plus."""


class TrainingOps(Protocol):
    """The operators. All are differentiable and none keeps state or writes into its arguments.

    "float32" stands for float64 where the arguments are float64. Every method raises `hal.errors.ShapeError` for
    shapes, dtypes and devices that do not fit together; tensors of one call have one dtype unless said otherwise. An
    implementation under test may have only some of the methods.
    """

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean_D(x^2) + eps) * weight, [T, D] in the dtype of `x_TD`.

        Everything is in float32 and rounded once, after the weight: as in `torch.nn.RMSNorm`, Megatron-LM and
        Transformer Engine. Llama's code in transformers rounds before the weight as well: one rounding more. In the
        backward pass the sums over D and over T are in float32, and each gradient is rounded once.

        Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
        """
        ...

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """Return (x - mean) / sqrt(mean_D((x - mean)^2) + eps) * weight + bias, [T, D] in the dtype of `x_TD`.

        In float32, rounded once. The variance is that of the differences, in two passes or by Welford's update;
        mean(x^2) - mean^2 loses all digits where the mean is large, and is not admitted.

        Source: Ba et al. 2016 (arXiv:1607.06450).
        """
        ...

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate the first R channels of every head, and return [T, H, d] in the dtype of `x_THd`.

        The half-split convention of Llama and of DeepSeek in transformers (`rotate_half`): channel i < R/2 is paired
        with channel i + R/2,

            y_i = x_i cos_i - x_{i+R/2} sin_i,    y_{i+R/2} = x_{i+R/2} cos_{i+R/2} + x_i sin_{i+R/2}.

        GPT-J, and DeepSeek's own code, pair the channels 2i and 2i+1 instead. Channels from R on pass unchanged (Ling
        2.0 rotates half of them). Products and sum are in float32, rounded once; transformers rounds three times.

        Args:
            x_THd: queries or keys.
            cos_TR: float32 whatever the dtype of `x_THd` (float64 for float64), both halves alike; R is even. No
                gradient flows into the table.
            sin_TR: as `cos_TR`.

        Source: Su et al. 2021 (arXiv:2104.09864).
        """
        ...

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """Return softmax(scale q k^T) v for each head, [T, H, e] in the dtype of `q_THd`.

        Query head h reads key head h // (H / G), as in Llama. With `causal` the T queries are the last of the S
        positions, so that query t sees the keys 0 to S - T + t (bottom right; torch's `is_causal` means top left).
        What a query does not see has no influence on its result, even where a key is NaN. (A value that is NaN may
        show, and in the backward pass a key: every kernel multiplies these by zeros for what is hidden.)

        Store points: the logits and the softmax are in float32; the probabilities, normalised over all keys or not at
        all, may be rounded to the dtype before they are multiplied by v; the result is rounded once. Backward
        (FlashAttention's equations): D = sum_e dy y from the rounded y, or sum_j P dP; dS = P (dP - D) may be rounded,
        and the gradients of k and v may be rounded for each query head before they are added up in float32.

        Source: Vaswani et al. 2017; Ainslie et al. 2023 (arXiv:2305.13245); Dao 2023 (arXiv:2307.08691).
        """
        ...

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
        """Return DeepSeek's multi-head latent attention over a compressed cache, [T, H, e].

        k_h = [up_k_h latent, k_R], v_h = up_v_h latent, q_h = [q_h, q_R,h]; then `attention`. The queries and the one
        rotated key of all heads come rotated already.

        Store points, besides those of `attention`: the keys and values that are projected up; or, where the
        projections are absorbed, q_h up_k_h and the probabilities' sum of latents.

        Source: DeepSeek-V2, eq. 9-19 (arXiv:2405.04434).
        """
        ...

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """Return the logits x W'^T of Ling's NormHead, [T, V] in the dtype of `x_TD`.

            W'_vd = W_vd / (n_d + 1e-7),    n_d = sqrt(sum_v W_vd^2)

        The norm of each *column*, over the vocabulary, in float32 over all V rows (all ranks, where the vocabulary is
        split); W' is rounded to the dtype of `x_TD`, and so is the product. The gradient is summed in float32 and
        rounded; dW', a product of tensors in that dtype, may be rounded before it goes on:

            dW_vd = dW'_vd / (n_d + 1e-7) - W_vd / n_d * sum_u(dW'_ud W_ud) / (n_d + 1e-7)^2,

        whose second term is 0 for a column of zeros.

        Args:
            x_TD: the last hidden states.
            weight_VD: the head.
            train: whether a gradient is wanted. False gives the same logits, without a history.
            through_norm: False drops the second term: the norm is a constant, as in Ling's published code.

        The implementations in public differ, and each difference is a fault here. `modeling_bailing_moe.py` takes the
        norm in the weights' dtype in training and in float32 in evaluation, where it overwrites the weights and stops
        normalising for good; vLLM clamps the norm at 1e-7 instead of adding; MindIE takes it in float16; Baichuan 2
        takes the norm of each row. Ling's report gives neither the axis nor the gradient.

        Source: Ling team 2025, section on loss spikes (arXiv:2503.05139); inclusionAI/Ling.
        """
        ...

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """Return mean_t(lse_t - logit_t,target + z lse_t^2) over the tokens that count, a float32 scalar.

        lse is the logsumexp over V. Tokens whose target is `ignore_index` count neither in the sum nor in the mean, and
        their gradient is zero; if no token counts, the loss is 0 (torch's is NaN). In float32 whatever the logits'
        dtype; the gradient (p - 1 [v = target] + 2 z lse p) / N is rounded once to that dtype.

        Args:
            logits_TV: in any dtype.
            targets_T: int64 or int32. The portable implementation takes narrower integers, too; others need not.
            ignore_index: the target of tokens that do not count.
            z_coefficient: z of the z-loss of Chowdhery et al. 2022 (arXiv:2204.02311).
        """
        ...
