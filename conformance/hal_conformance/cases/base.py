# SPDX-License-Identifier: Apache-2.0
"""What the cases share: presets, shapes by scale, and judging that never raises.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.model_spec import MoEModelSpec
from hal.moe.presets import PRESETS, preset
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.arguments import backward_pass, dense_bytes, has_elements
from hal_conformance.case import DTYPES, F64, SCALES, Array, Footprint, Malformed, Params, Scale, Unpromised

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one instance."""

    tokens: int
    width: int
    hidden: int


@dataclass(frozen=True)
class At(Params):
    """An instance whose sizes are not those of its scale."""

    sizes: Shape = Shape(0, 0, 0)


_SCALED = {"tiny": Shape(32, 48, 24), "small": Shape(96, 128, 64)}
FULL_TOKENS = 1024


def shape(p: Params) -> Shape:
    """Return the sizes of an instance: the published ones at "full", otherwise small ones; never the router's.

    Kernels lose tails where a size is no multiple of their tile. So every preset has another number of tokens, most
    of them odd or prime, and widths that are multiples of 8 (16 bytes, which torch's grouped product asks for) and
    seldom of 16 or 32.
    """
    if isinstance(p, At):
        return p.sizes
    at = list(PRESETS).index(p.preset)
    if p.scale in _SCALED:
        least = _SCALED[p.scale]
        return Shape(least.tokens + 1 + at, least.width + 8 * (at % 4), least.hidden + 8 * (at % 3))
    model = preset(p.preset)
    return Shape(FULL_TOKENS + 1 + at, model.hidden_size, model.expert_hidden_size)


def model_of(p: Params) -> MoEModelSpec:
    """Return the preset with the widths of this instance."""
    s = shape(p)
    published = p.scale == "full" and not isinstance(p, At)
    return preset(p.preset) if published else preset(p.preset).scaled(hidden=s.width, expert_hidden=s.hidden)


def gate_storage(spec: RouterSpec, p: Params) -> str:
    """Return the dtype in which the gate's weights and logits are stored."""
    return "float32" if spec.gate_dtype == "float32" else p.dtype


def weight_storage(spec: RouterSpec, p: Params) -> str:
    """Return the dtype of the routing weights."""
    return "float32" if spec.weight_dtype == "float32" else p.dtype


def mean_load(p: Params) -> int:
    """Return the rows of an expert under even routing, rounded up: the busier experts exceed it."""
    spec = preset(p.preset).router
    return -(-shape(p).tokens * spec.top_k // spec.num_experts)


def expert_bytes(p: Params) -> int:
    """Return the bytes of all routed experts' weights."""
    s = shape(p)
    return 3 * preset(p.preset).router.num_experts * s.width * s.hidden * make.NUMPY_DTYPES[p.dtype].itemsize


_TRAINED = ContextVar("trained", default=True)


@contextmanager
def nothing_trained() -> Iterator[None]:
    """Leave inputs as they are meanwhile, and run nothing backward."""
    token = _TRAINED.set(False)
    try:
        yield
    finally:
        _TRAINED.reset(token)


_LEAVES: ContextVar[Mapping[int, torch.Tensor]] = ContextVar("leaves", default=MappingProxyType({}))


@contextmanager
def same_leaves(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Make one leaf of each of these meanwhile, as a model has one Parameter for each weight, of whatever value."""
    token = _LEAVES.set(
        {id(tensor): tensor.detach().requires_grad_() for tensor in tensors if tensor.is_floating_point()}
    )
    try:
        yield
    finally:
        _LEAVES.reset(token)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same storage as a tensor that requires a gradient: what is written into it shows in the input.

    It has no gradient yet, or none any more.
    """
    if not _TRAINED.get():
        return tensor
    made = _LEAVES.get().get(id(tensor))
    if made is None:
        return tensor.detach().requires_grad_()
    made.grad = None
    return made


def observed(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Return the tensors that there are, without their history.

    Raises:
        Malformed: one of them is something else.
    """
    import torch

    for name, tensor in tensors.items():
        if not (tensor is None or isinstance(tensor, torch.Tensor)):
            raise Malformed(f"{name} is a {type(tensor).__name__}, not a tensor")
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are the same: device, dtype, shape, and every bit."""
    import torch

    if not (has_elements(one) and has_elements(other)):  # the worker says what is wrong with it
        return False
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    return torch.equal(dense_bytes(one), dense_bytes(other))


def same_results(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether two runs have the same results, in every bit."""
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


def part(named: dict[str, Any], of: str) -> dict[str, Any]:
    """Return what is named `of` and a slash before its own name, by that."""
    return {name.removeprefix(f"{of}/"): value for name, value in named.items() if name.startswith(f"{of}/")}


def fields_of(returned: Any, protocol: str) -> dict[str, Any]:
    """Return the fields of what an operator returned, by name.

    Args:
        returned: what came back.
        protocol: the name of what `hal.moe.ops` says must come back: "Routing", "Dispatch" or "LayerOutput".

    Raises:
        Malformed: it has not all of the fields.
    """
    from hal.moe import ops

    names: tuple[str, ...] = getattr(ops, protocol)._fields
    missing = [name for name in names if not hasattr(returned, name)]
    if missing:
        raise Malformed(f"a {type(returned).__name__} came back, which has no {', '.join(missing)}: not a {protocol}")
    return {name: getattr(returned, name) for name in names}


_KEPT = ContextVar("kept", default=False)


@contextmanager
def graphs_kept() -> Iterator[None]:
    """Keep the graphs of what is run backward meanwhile, so that they can be run again."""
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)


PassBack = Callable[[], None]
_BEFORE: ContextVar[Callable[[PassBack], object] | None] = ContextVar("before", default=None)


@contextmanager
def before_backward(run: Callable[[PassBack], object]) -> Iterator[None]:
    """Run something before the first backward pass inside, while that one's graph waits.

    Args:
        run: given that backward pass, which it may call at its time; otherwise it follows.
    """
    token = _BEFORE.set(run)
    try:
        yield
    finally:
        _BEFORE.reset(token)


def run_backward(results: Mapping[str, Any], upstream: Mapping[str, torch.Tensor]) -> None:
    """Run one backward pass from several results, by name.

    Raises:
        Malformed: one is no tensor, or of another shape or on another device than its gradient, or has no history
            although something is trained; autograd's own words would sound like a fault of the suite.
    """
    import torch

    for name, gradient in upstream.items():
        _check(f"{name}: " if name else "", results[name], gradient)
    if not _TRAINED.get():
        return
    for name in upstream:
        if not results[name].requires_grad:
            what = f"{name}: it" if name else "the result"
            raise Malformed(f"{what} requires no gradient, although what it is computed from does")
    gradients, kept = list(upstream.values()), _KEPT.get()

    @functools.cache
    def pass_back() -> None:
        with backward_pass(gradients, again=kept):
            torch.autograd.backward([results[name] for name in upstream], gradients, retain_graph=kept)

    if (first := _BEFORE.get()) is not None:
        _BEFORE.set(None)
        first(pass_back)
    pass_back()


def _check(what: str, result: Any, upstream: torch.Tensor) -> None:
    import torch

    if not isinstance(result, torch.Tensor):
        raise Malformed(f"{what}a {type(result).__name__} came back, not a tensor")
    if result.shape != upstream.shape:
        raise Malformed(f"{what}a tensor of shape {list(result.shape)} came back, expected {list(upstream.shape)}")
    if result.device != upstream.device:
        raise Malformed(f"{what}a tensor on {result.device} came back, expected {upstream.device}")
    if result.is_complex():
        raise Malformed(f"{what}a tensor of {result.dtype} came back")


def backward(result: Any, upstream: torch.Tensor) -> None:
    """Run the backward pass of what an operator returned. Raises as `run_backward`."""
    run_backward({"": result}, {"": upstream})


def loss_backward(loss: Any, upstream: float, given: torch.Tensor) -> None:
    """Run the backward pass of a loss: a tensor without axes, on the device of what was given. Raises as `backward`."""
    backward(loss, given.new_tensor(upstream, dtype=getattr(loss, "dtype", None)))


def keeps_nonfinite(contract: Contract) -> None:
    """Check that infinities and NaN are kept.

    Raises:
        Unpromised: the contract replaces them.
    """
    if contract.nonfinite != "ieee":
        raise Unpromised("the contract replaces infinities and NaN by finite values")


def wide(array: Array) -> F64:
    """Return an array in float64."""
    return np.asarray(array, np.float64)


MULTIPLYING = frozenset({"route", "experts", "layer", "attention", "latent_attention", "norm_head"})
"""Operators whose portable implementation multiplies matrices."""


@dataclass(frozen=True)
class Base:
    """A case over every preset and dtype; subclasses narrow it where it cannot differ."""

    name: str
    family: str
    needs: tuple[str, ...]
    what: str

    @property
    def multiplies(self) -> bool:
        """See `Case.multiplies`."""
        return not MULTIPLYING.isdisjoint(self.needs)

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return tuple(PRESETS)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return DTYPES

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`."""
        return SCALES

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint()


KINDS = ("ling-lite", "ling-2.0-mini", "mixtral-8x7b", "qwen2-moe")
"""One layer of each kind: softmax with shared experts; sigmoid, groups and a bias; few experts, none shared; softmax as
it is, a ragged number of experts, a gate for the shared one."""


class ByCounts(Base):
    """A case that depends on E and K only: one preset stands for all of the same numbers."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return one_for_each(lambda model: (model.router.num_experts, model.router.top_k))

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`: at tiny the fewest and the most experts, a power of two and a ragged number of them."""
        return SCALES if preset in KINDS else SCALES[1:]


def one_for_each(key: Callable[[MoEModelSpec], Hashable]) -> tuple[str, ...]:
    """Return the first preset of every value of `key`."""
    seen: dict[Hashable, str] = {}
    for name, model in PRESETS.items():
        seen.setdefault(key(model), name)
    return tuple(seen.values())


def router_arrays(p: Params, stream: str) -> dict[str, Array]:
    """Return x_TD, gate_ED and, where the router has one, bias_E.

    The bias is of the size of the gaps between scores, so that it changes about a tenth of the choices.
    """
    spec, s = preset(p.preset).router, shape(p)
    arrays = {
        "x_TD": make.store(make.activations(p.seed, f"{stream}/x", s.tokens, s.width), p.dtype),
        "gate_ED": make.store(make.gate(p.seed, f"{stream}/gate", spec.num_experts, s.width), gate_storage(spec, p)),
    }
    if spec.selection_bias:
        arrays["bias_E"] = make.store(make.normal(p.seed, f"{stream}/bias", spec.num_experts) / 64.0, "float32")
    return arrays
