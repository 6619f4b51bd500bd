# SPDX-License-Identifier: Apache-2.0
"""What happens to gradients after the backward pass, as an interface: accumulation, clipping and the optimisers.

Nothing here writes into its arguments: every method returns new tensors, in the order of its arguments. A list has one
tensor for each parameter, experts' and dense ones together. Losses in low precision come from what is stored between
steps, so the dtype of every store is part of the equations: states and sums are float32, whatever the parameters are.
A list may hold tensors of several dtypes, of any number of axes, none included, and it may be empty, as on a rank that
holds no parameter: then lists come back empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

CLIP_EPSILON = 1e-6
"""Added to the norm before division, as in torch, Megatron-LM and DeepSpeed."""


@dataclass(frozen=True)
class AdamHyper:
    """Hyperparameters of Adam and AdamW. Zero is a number like any other: a rate, a beta, a decay of 0 is meant.

    Attributes:
        lr: learning rate.
        beta1, beta2: decay rates of the two moments.
        epsilon: added to the root of the second moment, after bias correction.
        weight_decay: of the parameter itself (AdamW) or as part of the gradient (Adam).
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class SGDHyper:
    """Hyperparameters of SGD with momentum; the decay is part of the gradient. Zeros are meant, as in `AdamHyper`."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0


class AdamStep(NamedTuple):
    """What a step of Adam or AdamW returns: parameters in their dtype, both moments in float32."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


class SGDStep(NamedTuple):
    """What a step of SGD returns: parameters in their dtype, momentum in float32."""

    parameters: list[Tensor]
    momentum: list[Tensor]


class Clipped(NamedTuple):
    """What clipping returns: gradients in their dtype, and the norm before clipping as a float32 scalar."""

    gradients: list[Tensor]
    norm: Tensor


class OptimizerOps(Protocol):
    """The operators. Elementwise but for the norm; an implementation under test may have only some of them.

    All arithmetic is in float32 or wider. A parameter in bfloat16 or float16 is widened, stepped, and rounded once.
    A gradient may have another dtype than its parameter (Megatron-LM's main_grad is float32 beside bfloat16), and is
    taken as it is. Hyperparameters may be others at every step. A NaN in a gradient reaches its own element's parameter
    and state, and no other's.
    """

    def adamw_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        step: int,
        hyper: AdamHyper,
    ) -> AdamStep:
        """Take one step of AdamW; `step` is t, 1 for the first step, whose moments come in as zeros.

            m' = beta1 m + (1 - beta1) g                   stored in float32
            v' = beta2 v + (1 - beta2) g^2                 stored in float32
            p' = (1 - lr decay) p - lr (m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + epsilon)

        Source: Loshchilov and Hutter 2019, algorithm 2 (arXiv:1711.05101), as torch.optim.AdamW has it: the decay is
        multiplied by the learning rate.
        """
        ...

    def adam_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        step: int,
        hyper: AdamHyper,
    ) -> AdamStep:
        """Take one step of Adam: as AdamW with g + decay p in the place of g, and p in that of (1 - lr decay) p.

        Source: Kingma and Ba 2015, algorithm 1 (arXiv:1412.6980), with an L2 penalty as in torch.optim.Adam.
        """
        ...

    def sgd_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momentum: Sequence[Tensor],
        step: int,
        hyper: SGDHyper,
    ) -> SGDStep:
        """Take one step of SGD; `step` is 1 for the first, whose momentum comes in as zeros and is not dampened.

            d = g + decay p
            b' = d at step 1, momentum b + (1 - dampening) d later     stored in float32
            p' = p - lr b'

        Where momentum is 0, b' = d at every step: nothing is dampened then.

        Source: torch.optim.SGD, which differs from Sutskever et al. 2013 in that lr multiplies the momentum, too.
        """
        ...

    def clip_grad_norm(self, gradients: Sequence[Tensor], max_norm: float) -> Clipped:
        """Scale all gradients by min(1, max_norm / (norm + `CLIP_EPSILON`)).

        The norm is one for all gradients together, sqrt(sum g^2) in float32; each product is rounded once to the
        gradient's dtype. Below the limit the factor is exactly 1; a limit of infinity is none, and what is asked
        for is the norm. That of an empty list is 0, on whatever device. A NaN makes the norm and every gradient NaN. An
        infinity makes the norm infinite and the factor 0: finite gradients become 0, the infinite ones NaN.

        Source: Pascanu et al. 2013 (arXiv:1211.5063); `torch.nn.utils.clip_grad_norm_` with error_if_nonfinite=False.
        """
        ...

    def accumulate_gradients(self, parts: Sequence[Sequence[Tensor]], tokens: Sequence[int]) -> list[Tensor]:
        """Return the gradients of the mean loss over a whole batch, in float32, from those of its micro-batches.

        `parts[i]` are the gradients of the mean loss over the `tokens[i]` tokens of micro-batch i, in any dtype:
        the result is sum_i (tokens[i] / sum_j tokens[j]) parts[i], added up in float32. A mean over micro-batches
        is another number wherever their token counts differ. A micro-batch without tokens counts for nothing,
        whatever its gradients are: those of a mean over nothing are NaN.
        """
        ...
