# SPDX-License-Identifier: Apache-2.0
"""Random numbers on one device: the device's own generator, and portable streams.

The device's own generator is fast, and differs between vendors. A portable stream gives the same bits on every
device (hal/philox.py): use it where two devices must start from the same weights or make the same noisy choice,
as the Ling report's stochastic routing warm-up does.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, final

from hal import philox

if TYPE_CHECKING:
    import torch


class Random(abc.ABC):
    """Random numbers of one opened device. A backend implements the hooks that start with an underscore."""

    def __init__(self, device_id: str, torch_device: torch.device) -> None:
        self.device_id = device_id
        self.torch_device = torch_device

    @abc.abstractmethod
    def _seed(self, seed: int) -> None: ...

    @abc.abstractmethod
    def _get_state(self) -> torch.Tensor: ...

    @abc.abstractmethod
    def _set_state(self, state: torch.Tensor) -> None: ...

    @final
    def seed(self, seed: int) -> None:
        """Seed this device's own generator, and no other device's.

        Raises:
            ValueError: the seed lies outside [0, 2**64).
        """
        if not 0 <= seed < 2**64:
            raise ValueError(f"{self.device_id}: the seed must lie in [0, 2**64), not {seed}")
        self._seed(seed)

    @final
    def get_state(self) -> torch.Tensor:
        """Return the generator's state, uint8 on the CPU; only this vendor's devices can take it back."""
        return self._get_state()

    @final
    def set_state(self, state: torch.Tensor) -> None:
        """Put a state from `get_state()` back.

        Raises:
            ValueError: the state is of another generator.
        """
        try:
            self._set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{self.device_id}: this is no state of this device's generator") from error

    @final
    def stream(self, seed: int, name: str | int) -> RandomStream:
        """Return the portable stream `name` of `seed`, at its beginning, with its tensors on this device."""
        return RandomStream(seed, name, self.torch_device)


@final
class RandomStream:
    """A portable stream of random numbers: the same bits on every device and host, whatever was drawn elsewhere.

    `bits` and `uniform` are computed on the device in integer arithmetic; `normal` on the host, since devices
    disagree in the last bit of a logarithm, and copied.

    Attributes:
        position: how many 32-bit words were drawn; set it to jump.
    """

    def __init__(self, seed: int, name: str | int, device: torch.device, position: int = 0) -> None:
        self.seed = seed
        self.name = name
        self.device = device
        self.position = position
        self._number = philox.stream_number(name)
        self._keys = philox.round_keys(seed)

    def _draw(self, shape: tuple[int, ...]) -> tuple[int, int]:
        n = 1
        for size in shape:
            n *= size
        start, self.position = self.position, self.position + n
        return start, n

    def bits(self, *shape: int) -> torch.Tensor:
        """Return random 32-bit words of this shape, as int64 in [0, 2**32)."""
        import torch

        start, n = self._draw(shape)
        first = start // 4
        count = -(-(start + n) // 4) - first
        index = torch.arange(first, first + count, dtype=torch.int64, device=self.device)
        c0, c1 = index & philox.MASK, index >> 32
        c2 = torch.full_like(index, self._number & philox.MASK)
        c3 = torch.full_like(index, self._number >> 32)
        m0, m1 = philox.MULTIPLIERS
        for k0, k1 in self._keys:
            # The product needs 64 unsigned bits; two's complement keeps them all, and the mask takes the sign
            # extension off the upper half.
            p0, p1 = c0 * m0, c2 * m1
            c0, c1, c2, c3 = (
                ((p1 >> 32) & philox.MASK) ^ c1 ^ k0,
                p1 & philox.MASK,
                ((p0 >> 32) & philox.MASK) ^ c3 ^ k1,
                p0 & philox.MASK,
            )
        words = torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)
        return words[start - 4 * first :][:n].reshape(shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return float32 in [0, 1), multiples of 2**-24."""
        import torch

        return (self.bits(*shape) >> 8).to(torch.float32) * 2.0**-24

    def normal(self, *shape: int) -> torch.Tensor:
        """Return float32 from N(0, 1)."""
        import torch

        start, n = self._draw(shape)
        values = philox.normal(self.seed, self.name, n, offset=start)
        return torch.from_numpy(values).reshape(shape).to(self.device)
