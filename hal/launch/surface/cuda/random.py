# SPDX-License-Identifier: Apache-2.0
"""torch.cuda's random numbers.

A CPU has one generator, which serves what the program makes on the host as well: seeding "the GPU" seeds both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, final

from hal.launch.api import active, api, count_made, value
from hal.launch.redirection import Redirection
from hal.launch.surface.cuda.device import cuda_index

if TYPE_CHECKING:
    import torch

_ONE_GENERATOR = "on a CPU the generator is the host's, too"


@api("torch.cuda.manual_seed", "torch.cuda.random.manual_seed", note=_ONE_GENERATOR)
def manual_seed(r: Redirection, seed: int) -> None:
    """Seed the current device's generator."""
    r.device.random.seed(_unsigned(seed))


@api("torch.cuda.manual_seed_all", "torch.cuda.random.manual_seed_all", note=_ONE_GENERATOR)
def manual_seed_all(r: Redirection, seed: int) -> None:
    """Seed every device's generator."""
    for device in r.devices:
        device.random.seed(_unsigned(seed))


def _unsigned(seed: int) -> int:
    # torch takes negative seeds, and means the same bits.
    return int(seed) % 2**64


@api("torch.cuda.seed", "torch.cuda.seed_all", "torch.cuda.random.seed", "torch.cuda.random.seed_all")
def seed(r: Redirection) -> None:
    """Seed with a number that nobody chose."""
    import secrets

    manual_seed_all(r, secrets.randbits(63))


@api("torch.cuda.initial_seed", "torch.cuda.random.initial_seed")
def initial_seed(r: Redirection) -> int:
    """The seed in force."""
    return _generator(r, r.current).initial_seed()


@api("torch.cuda.get_rng_state", "torch.cuda.random.get_rng_state", note=_ONE_GENERATOR)
def get_rng_state(r: Redirection, device: Any = "cuda") -> torch.Tensor:
    """The state of a generator, as uint8 on the host."""
    return _on_host(r, r.devices[cuda_index(r, device)].random.get_state())


@api("torch.cuda.get_rng_state_all", "torch.cuda.random.get_rng_state_all", note=_ONE_GENERATOR)
def get_rng_state_all(r: Redirection) -> list[torch.Tensor]:
    """The states of all generators."""
    return [_on_host(r, device.random.get_state()) for device in r.devices]


@api("torch.cuda.set_rng_state", "torch.cuda.random.set_rng_state", note=_ONE_GENERATOR)
def set_rng_state(r: Redirection, new_state: torch.Tensor, device: Any = "cuda") -> None:
    """Put a state back. One that was written on another kind of device is refused by its size."""
    r.devices[cuda_index(r, device)].random.set_state(new_state)


@api("torch.cuda.set_rng_state_all", "torch.cuda.random.set_rng_state_all", note=_ONE_GENERATOR)
def set_rng_state_all(r: Redirection, new_states: Iterable[torch.Tensor]) -> None:
    """Put the states of all generators back."""
    for index, state in enumerate(new_states):
        set_rng_state(r, state, index)


def _on_host(r: Redirection, state: torch.Tensor) -> torch.Tensor:
    return state if r.hosts is None else r.hosts.add(state)


@final
class Generators:
    """What `torch.cuda.default_generators` is: one generator for each device."""

    def __len__(self) -> int:
        r = active()
        return 0 if r is None else len(r.devices)

    def __getitem__(self, index: int) -> torch.Generator:
        r = active()
        if r is None:
            raise IndexError("the redirection that gave these generators has ended")
        return _generator(r, range(len(self))[index])

    def __iter__(self) -> Iterator[torch.Generator]:
        return (self[index] for index in range(len(self)))


def _generator(r: Redirection, index: int) -> torch.Generator:
    if r.hosts is not None:
        import torch

        return torch.default_generator
    generator: torch.Generator = r.module.default_generators[r.targets[index].index]
    return generator


@value("torch.cuda.default_generators", note=_ONE_GENERATOR)
def default_generators(r: Redirection) -> Generators:
    """See `Generators`."""
    return Generators()


class GeneratorType(type):
    """The metaclass of what stands in for `torch.Generator`: calling it makes torch's own, on the true device."""

    def __call__(cls, device: Any = "cpu") -> Any:
        """Make a generator."""
        import torch

        r = active()
        true = device if r is None else r.translate(device)
        if true is not device:
            count_made("torch.Generator")
        return torch.Generator(device=true)

    def __instancecheck__(cls, instance: object) -> bool:
        import torch

        return isinstance(instance, torch.Generator)

    def __subclasscheck__(cls, subclass: type) -> bool:
        import torch

        return issubclass(subclass, torch.Generator)


@value("torch.Generator", note="one that is made for CUDA says the true device when asked for it")
def generator_class(r: Redirection) -> type:
    """See `GeneratorType`."""
    return GeneratorType("Generator", (), {"__module__": "torch"})
