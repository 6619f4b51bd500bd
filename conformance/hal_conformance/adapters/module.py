# SPDX-License-Identifier: Apache-2.0
"""Any `torch.nn.Module` that is an MoE block, as an implementation under test.

Legend: T tokens, D model dim, F expert hidden dim, E routed experts, K choices per token, S shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hal.errors import ShapeError
from hal.moe.losses import aux_loss, z_loss
from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import LayerOutput, LayerWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.adapters import unsupported
from hal_conformance.adapters.watching import Watch

Weights = Mapping[str, Tensor]
"""The weights that a case gives: `gate_ED`, `bias_E`, `w1_EFD`, `w3_EFD`, `w2_EDF`, `shared_w1_SD`, `shared_w3_SD`,
`shared_w2_DS`, `shared_gate_D`; those that a preset does not have are absent."""

Place = str | tuple[str, ...] | Callable[[Weights], Tensor]
"""What a parameter is made of: a weight, several joined along their last dimension but one, or a function's result."""

Read = Callable[[Any, Watch], tuple[Tensor, Tensor, Tensor]]
"""From what the router submodule returned, and what was seen inside, to logits, weights and experts."""


def in_order(output: Any, watch: Watch) -> tuple[Tensor, Tensor, Tensor]:
    """Read (logits, weights, experts), which the routers of transformers 5 return."""
    logits, weights, experts = output
    return logits, weights, experts


class ModuleLayer:
    """`MoEOps.layer` and `MoEOps.route` of a module and of its router submodule.

    The weights of a case take the places of the parameters (`torch.func.functional_call`), so that gradients flow to
    them. The block is called with activations of [1, T, D] and returns them, alone or first in a tuple. What it returns
    besides is not looked at: the losses, which blocks leave to their model, are those of `hal.moe`, so that the layer's
    cases judge the block alone.

    Args:
        factory: builds the module for a model of given D (`hidden_size`), F, S and router, on torch's default device;
            its initial values do not matter. For cases of the router alone, F is 1 and there are no shared experts.
        names: each parameter's name to what it is made of. `{e}` in a name stands for every expert, whose part of the
            weight it gets. A shape that differs is viewed: [D] as [1, D].
        router: the submodule that routes, called with activations of [1, T, D] in the cases of the router.
        read: what to make of that submodule's result.
        why_not: returns why the module cannot be what a router spec asks for with activations of a dtype, or "".
            Weights without a place, and places without a weight, are found without it.
        replays: returns why a routing cannot be replayed, or "".
    """

    def __init__(
        self,
        factory: Callable[[MoEModelSpec], nn.Module],
        names: Mapping[str, Place],
        *,
        router: str = "gate",
        read: Read = in_order,
        why_not: Callable[[RouterSpec, torch.dtype], str] = lambda spec, dtype: "",
        replays: Callable[[RouterSpec], str] = lambda spec: "",
    ) -> None:
        self._factory = factory
        self._names = names
        self._router = router
        self._read = read
        self._why_not = why_not
        self._replays = replays
        self._built: tuple[Any, nn.Module] | None = None

    def layer(
        self,
        x_TD: Tensor,
        weights: LayerWeights,
        spec: MoEModelSpec,
        *,
        experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:
        """Run the block; see `MoEOps.layer`."""
        if capacity is not None:
            raise unsupported("the block has no capacity", x_TD)
        self._check(spec.router, x_TD, experts_TK)
        module = self._module(spec, x_TD)
        parameters = bind(module, self._names, by_name(weights), x_TD)
        watch = Watch(spec.router.num_experts, spec.router.top_k, experts_TK=experts_TK)
        with _heard(module.get_submodule(self._router)) as said, watch:
            y = functional_call(module, parameters, (x_TD[None],))
        routing = watch.routing(*self._read(said[0], watch))
        return self.output((y[0] if isinstance(y, tuple) else y).reshape(x_TD.shape), routing, spec, experts_TK)

    def output(
        self, y_TD: Tensor, routing: Routing, spec: MoEModelSpec, experts_TK: Tensor | None = None
    ) -> LayerOutput:
        """Return the result of a layer, with losses from `hal.moe`."""
        aux = aux_loss(routing.scores_TE, routing.experts_TK, spec.router)
        return LayerOutput(y_TD, routing, aux, z_loss(routing.logits_TE))

    def route(
        self,
        x_TD: Tensor,
        gate_ED: Tensor,
        spec: RouterSpec,
        bias_E: Tensor | None = None,
        *,
        experts_TK: Tensor | None = None,
    ) -> Routing:
        """Run the router submodule; see `MoEOps.route`."""
        self._check(spec, x_TD, experts_TK)
        router = self._module(_router_alone(spec, x_TD.shape[1]), x_TD).get_submodule(self._router)
        watch = Watch(spec.num_experts, spec.top_k, experts_TK=experts_TK)
        given = {"gate_ED": gate_ED} | ({} if bias_E is None else {"bias_E": bias_E})
        with watch:
            output = self.call_router(router, x_TD, given)
        return watch.routing(*self._read(output, watch))

    def call_router(self, router: nn.Module, x_TD: Tensor, weights: Weights) -> Any:
        """Run the router submodule alone."""
        start = f"{self._router}."
        names = {name.removeprefix(start): place for name, place in self._names.items() if name.startswith(start)}
        return functional_call(router, bind(router, names, weights, x_TD), (x_TD[None],))

    def _check(self, spec: RouterSpec, x_TD: Tensor, experts_TK: Tensor | None) -> None:
        reason = self._why_not(spec, x_TD.dtype) or ("" if experts_TK is None else self._replays(spec))
        if reason:
            raise unsupported(reason, x_TD)

    def _module(self, spec: MoEModelSpec, x_TD: Tensor) -> nn.Module:
        # One is kept: cases come preset by preset, and at full scale a module is large.
        key = (spec, x_TD.device, x_TD.dtype)
        if self._built is None or self._built[0] != key:
            with torch.device(x_TD.device):
                self._built = key, self._factory(spec)
        return self._built[1]


def _router_alone(spec: RouterSpec, width: int) -> MoEModelSpec:
    return MoEModelSpec("router", spec, 1, width, 1, 0, 0, False, None, None, "a router's case")


@contextmanager
def _heard(router: nn.Module) -> Iterator[list[Any]]:
    """Collect what a submodule returns."""
    said: list[Any] = []
    hook = router.register_forward_hook(lambda module, arguments, output: said.append(output))
    try:
        yield said
    finally:
        hook.remove()


def by_name(weights: LayerWeights) -> dict[str, Tensor]:
    """Return a layer's weights by the names of `Weights`."""
    found: dict[str, Tensor | None] = {
        "gate_ED": weights.gate_ED, "bias_E": weights.bias_E, "shared_gate_D": weights.shared_gate_D,
    }  # fmt: skip
    found |= dict(zip(("w1_EFD", "w3_EFD", "w2_EDF"), weights.experts, strict=True))
    found |= dict(zip(("shared_w1_SD", "shared_w3_SD", "shared_w2_DS"), weights.shared or (None,) * 3, strict=True))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def bind(module: nn.Module, names: Mapping[str, Place], weights: Weights, at: Tensor) -> dict[str, Tensor]:
    """Return what takes the place of each parameter of a module, and of the buffers that `names` lists.

    Raises:
        UnsupportedOperation: the module has a parameter for which there is no weight, or, where no function makes any,
            no place for a weight.
        ShapeError: a weight has another number of elements than its parameter.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found: dict[str, Tensor] = {}
    homeless = set() if any(callable(place) for place in names.values()) else set(weights)
    for name, place, expert in _expanded(names, len(weights["gate_ED"])):
        made_of = (place,) if isinstance(place, str) else place if isinstance(place, tuple) else ()
        if name not in own or not all(weight in weights for weight in made_of):
            continue
        homeless.difference_update(made_of)
        if callable(place):
            tensor = place(weights)
        else:
            tensor = joined([weights[n] if expert is None else weights[n][expert] for n in made_of])
        if tensor.numel() != own[name].numel():
            raise ShapeError(f"{name} has shape {list(own[name].shape)}", expected=str(list(tensor.shape)))
        found[name] = tensor if tensor.shape == own[name].shape else tensor.reshape(own[name].shape)
    empty = [name for name, _ in module.named_parameters() if name not in found]
    if empty:
        raise unsupported(f"the module has {', '.join(empty)}, for which the preset has no weight", at)
    if homeless:
        raise unsupported(f"the module has no place for {', '.join(sorted(homeless))}", at)
    return found


def joined(parts: list[Tensor]) -> Tensor:
    """Return weights that a module keeps in one parameter."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _expanded(names: Mapping[str, Place], experts: int) -> Iterator[tuple[str, Place, int | None]]:
    for name, place in names.items():
        if "{e}" in name:
            yield from ((name.replace("{e}", str(e)), place, e) for e in range(experts))
        else:
            yield name, place, None
