# SPDX-License-Identifier: Apache-2.0
"""The published numbers of one Mixture-of-Experts model, as far as its MoE layers are concerned.

Legend: D model dim, F expert hidden dim, E routed experts, S shared experts' total hidden width.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from hal.arguments import number
from hal.errors import ConfigError
from hal.moe.router_spec import RouterSpec


@dataclass(frozen=True)
class MoEModelSpec:
    """What a model's MoE layer is made of.

    Attributes:
        name: the preset's name.
        router: the router's equations.
        num_layers: transformer layers, the dense ones included.
        hidden_size: D.
        expert_hidden_size: F.
        num_shared_experts: experts that every token visits, unrouted; computed as one of width S.
        shared_hidden_size: S, the total width of the shared experts; 0 = none.
        shared_gate: the shared output is multiplied by sigmoid(x . g), one number per token.
        balance_coefficient: what `MoEOps.aux_loss` of one layer is multiplied by to give the published loss of that
            layer, so a coefficient of Hugging Face's is K times the published number (see `hal.moe.losses.aux_loss`,
            also for how several layers are put together); None: not published, or not used.
        z_coefficient: the same for the router's z-loss.
        source: where the numbers come from.
        num_dense_layers: how many of the layers have an ordinary MLP instead of experts.

    Raises:
        ConfigError: a size or a coefficient is none, or shared experts and their width contradict each other.
    """

    name: str
    router: RouterSpec
    num_layers: int
    hidden_size: int
    expert_hidden_size: int
    num_shared_experts: int
    shared_hidden_size: int
    shared_gate: bool
    balance_coefficient: float | None
    z_coefficient: float | None
    source: str
    num_dense_layers: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_layers", 1),
            ("hidden_size", 1),
            ("expert_hidden_size", 1),
            ("num_shared_experts", 0),
            ("shared_hidden_size", 0),
            ("num_dense_layers", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"MoEModelSpec {self.name}: {name} is {value!r}",
                    expected=f"an integer of at least {least}",
                )
        if type(self.shared_gate) is not bool:
            raise ConfigError(
                f"MoEModelSpec {self.name}: shared_gate is {self.shared_gate!r}", expected="True or False"
            )
        for name in ("balance_coefficient", "z_coefficient"):
            value = getattr(self, name)
            if value is not None:
                number(f"MoEModelSpec {self.name}: {name}", value, least=0.0, most=sys.float_info.max)
        if (self.num_shared_experts == 0) != (self.shared_hidden_size == 0):
            raise ConfigError(
                f"MoEModelSpec {self.name}: {self.num_shared_experts} shared experts of total width "
                f"{self.shared_hidden_size}",
                expected="both zero or neither",
            )
        if self.shared_gate and self.num_shared_experts == 0:
            raise ConfigError(f"MoEModelSpec {self.name}: a shared gate without shared experts")
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"MoEModelSpec {self.name}: {self.num_dense_layers} of {self.num_layers} layers are dense",
            )

    def scaled(
        self,
        *,
        hidden: int,
        expert_hidden: int,
        shared_hidden: int | None = None,
    ) -> MoEModelSpec:
        """Return the model with smaller (or larger) matrices and the same router: E, K and groups are kept.

        Args:
            hidden: the new D.
            expert_hidden: the new F.
            shared_hidden: the new S; by default S keeps its published ratio to F. Ignored without shared
                experts.
        """
        if self.num_shared_experts == 0:
            shared = 0
        elif shared_hidden is None:
            shared = max(1, round(self.shared_hidden_size * expert_hidden / self.expert_hidden_size))
        else:
            shared = shared_hidden
        return replace(
            self,
            hidden_size=hidden,
            expert_hidden_size=expert_hidden,
            shared_hidden_size=shared,
            source=f"{self.source} (scaled from D = {self.hidden_size}, F = {self.expert_hidden_size})",
        )

    @property
    def layer_parameters(self) -> int:
        """The number of parameters of one MoE layer, with router, experts, shared experts and their gate, no bias."""
        routed = 3 * self.router.num_experts * self.hidden_size * self.expert_hidden_size
        shared = 3 * self.hidden_size * self.shared_hidden_size
        gates = self.router.num_experts * self.hidden_size + (self.hidden_size if self.shared_gate else 0)
        return gates + routed + shared
