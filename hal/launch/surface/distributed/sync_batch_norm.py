# SPDX-License-Identifier: Apache-2.0
"""`nn.SyncBatchNorm` on a CPU: torch has its kernels for accelerators alone.

Statistics are those of all ranks' batches together. Sums of 16-bit inputs run in float32, as CUDA's kernels do them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the forward pass where ranks have to agree."""
    import torch

    if redirection.hosts is None:
        return
    owner = torch.nn.SyncBatchNorm
    own = owner.forward
    function = _function()

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        dist = torch.distributed
        on_cpu = state._active is not None and input.device.type == "cpu"
        if not (on_cpu and self.training and dist.is_available() and dist.is_initialized()):
            return own(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / self.num_batches_tracked.item()
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
            return torch.nn.functional.batch_norm(input, mean, var, self.weight, self.bias, True, factor, self.eps)
        made: torch.Tensor
        made, mean, var, count = function.apply(input, self.weight, self.bias, self.eps, group)
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), factor)
        return made

    patches.set(owner, "forward", forward)


def _function() -> Any:
    """Return the operation: input [N, C, ...] to output, mean [C], variance [C] and the number of values for each."""
    import torch
    import torch.distributed as dist

    def sums(x: torch.Tensor) -> torch.Tensor:
        return x.sum([axis for axis in range(x.dim()) if axis != 1])

    def spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.view(1, -1, *[1] * (like.dim() - 2))

    class Normalized(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: Any, weight: Any, bias: Any, eps: float, group: Any) -> Any:
            x = input if input.dtype == torch.float64 else input.float()
            channels = x.shape[1]
            both = torch.cat([sums(x), x.new_tensor([x.numel() // channels])])
            dist.all_reduce(both, group=group)
            count = both[-1]
            mean = both[:-1] / count
            centred = x - spread(mean, x)
            var = sums(centred * centred)
            dist.all_reduce(var, group=group)
            var = var / count
            inverse = (var + eps).rsqrt()
            normal = centred * spread(inverse, x)
            ctx.save_for_backward(normal, inverse, weight, count)
            ctx.group, ctx.has_bias, ctx.dtype = group, bias is not None, input.dtype
            ctx.mark_non_differentiable(mean, var, count)
            out = normal if weight is None else normal * spread(weight.to(x.dtype), x)
            out = out if bias is None else out + spread(bias.to(x.dtype), x)
            return out.to(input.dtype), mean, var, count

        @staticmethod
        def backward(ctx: Any, gradient: Any, *others: Any) -> Any:
            normal, inverse, weight, count = ctx.saved_tensors
            g = gradient.to(normal.dtype)
            own = torch.cat([sums(g), sums(g * normal)])  # of this rank: gradients of bias and weight
            both = own.clone()
            dist.all_reduce(both, group=ctx.group)
            of_mean, of_normal = (spread(part / count, g) for part in both.chunk(2))
            scale = inverse if weight is None else inverse * weight.to(normal.dtype)
            for_input = (g - of_mean - normal * of_normal) * spread(scale, g)
            for_bias, for_weight = own.chunk(2)
            return (
                for_input.to(ctx.dtype), None if weight is None else for_weight.to(weight.dtype),
                for_bias.to(weight.dtype if weight is not None else ctx.dtype) if ctx.has_bias else None, None, None,
            )  # fmt: skip

    return Normalized
