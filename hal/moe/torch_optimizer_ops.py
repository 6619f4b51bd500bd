# SPDX-License-Identifier: Apache-2.0
"""The portable implementation of `OptimizerOps`: torch's own optimisers and clipping, on copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hal.errors import ShapeError
from hal.moe.optimizer_ops import AdamHyper, AdamStep, Clipped, OptimizerOps, SGDHyper, SGDStep
from hal.moe.precision import wide_dtype


class TorchOptimizerOps(OptimizerOps):
    """`OptimizerOps` on every device that torch can address; stateless."""

    foreach: bool | None = None
    """Whether torch's implementation over lists is taken; None leaves it to torch."""

    @torch.no_grad()
    def adamw_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        step: int,
        hyper: AdamHyper,
    ) -> AdamStep:
        """See `OptimizerOps.adamw_step`."""
        return self._adam(parameters, gradients, first, second, step, hyper, decoupled=True)

    @torch.no_grad()
    def adam_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        step: int,
        hyper: AdamHyper,
    ) -> AdamStep:
        """See `OptimizerOps.adam_step`."""
        return self._adam(parameters, gradients, first, second, step, hyper, decoupled=False)

    def _adam(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        step: int,
        hyper: AdamHyper,
        *,
        decoupled: bool,
    ) -> AdamStep:
        _check("adamw_step" if decoupled else "adam_step", step, parameters, gradients, first, second)
        stepped, moments, squares = _copies(parameters), _copies(first), _copies(second)
        take = adamw if decoupled else adam
        take(
            stepped,
            _wide(gradients),
            moments,
            squares,
            [],
            [torch.tensor(float(step - 1)) for _ in stepped],
            foreach=self.foreach,
            amsgrad=False,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            lr=hyper.lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.epsilon,
            maximize=False,
        )
        return AdamStep(_narrow(stepped, parameters), moments, squares)

    @torch.no_grad()
    def sgd_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momentum: Sequence[Tensor],
        step: int,
        hyper: SGDHyper,
    ) -> SGDStep:
        """See `OptimizerOps.sgd_step`."""
        _check("sgd_step", step, parameters, gradients, momentum)
        stepped = _copies(parameters)
        # torch takes the gradient itself where there is no buffer yet, and leaves one alone where there is no momentum.
        fresh = step == 1 or hyper.momentum == 0.0
        buffers: list[Tensor | None] = [None for _ in momentum] if fresh else [*_copies(momentum)]
        sgd(
            stepped,
            _wide(gradients),
            buffers,
            foreach=self.foreach,
            weight_decay=hyper.weight_decay,
            momentum=hyper.momentum,
            lr=hyper.lr,
            dampening=hyper.dampening,
            nesterov=False,
            maximize=False,
        )
        # Without momentum torch keeps no buffer: b' is what it would have been.
        kept = [
            gradient.to(torch.float32) + hyper.weight_decay * parameter.to(torch.float32) if buffer is None else buffer
            for buffer, gradient, parameter in zip(buffers, gradients, parameters, strict=True)
        ]
        return SGDStep(_narrow(stepped, parameters), kept)

    @torch.no_grad()
    def clip_grad_norm(self, gradients: Sequence[Tensor], max_norm: float) -> Clipped:
        """See `OptimizerOps.clip_grad_norm`."""
        holders = [torch.nn.Parameter(torch.empty_like(g, dtype=wide_dtype(g.dtype))) for g in gradients]
        for holder, gradient in zip(holders, gradients, strict=True):
            holder.grad = gradient.to(holder.dtype, copy=True)
        norm = torch.nn.utils.clip_grad_norm_(holders, max_norm, foreach=self.foreach)
        clipped = [holder.grad for holder in holders if holder.grad is not None]
        return Clipped(_narrow(clipped, gradients), norm)

    @torch.no_grad()
    def accumulate_gradients(self, parts: Sequence[Sequence[Tensor]], tokens: Sequence[int]) -> list[Tensor]:
        """See `OptimizerOps.accumulate_gradients`."""
        if len(parts) != len(tokens) or not parts or sum(tokens) < 1:
            raise ShapeError(
                f"accumulate_gradients: {len(parts)} micro-batches with the token counts {list(tokens)}",
                expected="a token count for each, and a token",
            )
        total = [torch.zeros_like(gradient, dtype=wide_dtype(gradient.dtype)) for gradient in parts[0]]
        whole = sum(tokens)
        for part, count in zip(parts, tokens, strict=True):
            if not count:
                continue
            for summed, gradient in zip(total, part, strict=True):
                summed.add_(gradient.to(summed.dtype), alpha=count / whole)
        return total


def _check(where: str, step: int, *lists: Sequence[Tensor]) -> None:
    """Refuse lists of different lengths or shapes, and steps before the first."""
    if step < 1:
        raise ShapeError(f"{where}: step is {step}", expected="1 for the first step")
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in lists]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ShapeError(f"{where}: parameters, gradients and states have the shapes {shapes}", expected="the same")


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(wide_dtype(tensor.dtype)) for tensor in tensors]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to(wide_dtype(tensor.dtype), copy=True) for tensor in tensors]


def _narrow(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(other.dtype) for tensor, other in zip(tensors, like, strict=True)]


torch_optimizer_ops = TorchOptimizerOps()
"""The instance that everything uses unless told otherwise."""
