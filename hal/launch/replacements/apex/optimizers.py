# SPDX-License-Identifier: Apache-2.0
"""Optimisers."""

from __future__ import annotations

from typing import Any

import torch

from hal.launch.replacements.finder import refuse, stands_in

_INSTEAD = "torch's own optimiser"


class FusedAdam(torch.optim.Adam):
    """torch's Adam with apex's arguments: `adam_w_mode` decouples the decay, which is 0 by default."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
        set_grad_none: bool = True, capturable: bool = False, master_weights: bool = False,
    ) -> None:  # fmt: skip
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")  # apex's own words
        for given, what in ((not bias_correction, "bias_correction=False"), (master_weights, "master_weights=True")):
            if given:
                raise refuse("apex.optimizers.FusedAdam", f"torch's Adam has no {what}")
        stands_in("apex.optimizers.FusedAdam", _INSTEAD)
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=adam_w_mode)


class FusedSGD(torch.optim.SGD):
    """torch's SGD with apex's arguments."""

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, wd_after_momentum: bool = False, materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:  # fmt: skip
        if wd_after_momentum:
            raise refuse("apex.optimizers.FusedSGD", "torch's SGD has no wd_after_momentum=True")
        stands_in("apex.optimizers.FusedSGD", _INSTEAD)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
