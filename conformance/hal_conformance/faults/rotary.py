# SPDX-License-Identifier: Apache-2.0
"""Faults of rotary positions: which channels turn together, which way, and in which precision."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.torch_training_ops import TorchTrainingOps
from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import fault


class Rotary(TorchTrainingOps):
    """The portable operators, of which the rotation can be changed."""

    families = ("rotary",)


@fault("vllm-ascend#12765")
class InterleavedRotary(Rotary):
    """Neighbouring channels turn together instead of those half the width apart."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        n = cos_TR.shape[1]
        wide = x_THd[..., :n].float()
        a, b, c, s = wide[..., ::2], wide[..., 1::2], cos_TR[:, None, : n // 2], sin_TR[:, None, : n // 2]
        y = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        return torch.cat((y.to(x_THd.dtype), x_THd[..., n:]), -1)


@fault()
class RotatesForwardInBackward(Rotary):
    """The backward pass turns the same way as the forward pass."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        turn = super().rotary
        return by_hand(lambda x: turn(x, cos_TR, sin_TR), lambda dy, _: turn(dy, cos_TR, sin_TR), x_THd)


@fault()
class RotatesAllChannels(Rotary):
    """A table of some channels is applied to all of them."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        if cos_TR.shape[1] < x_THd.shape[2]:
            cos_TR, sin_TR = (torch.cat((t, t), 1)[:, : x_THd.shape[2]] for t in (cos_TR, sin_TR))
        return super().rotary(x_THd, cos_TR, sin_TR)


@fault("transformers PR#29285")
class TableInStorage(Rotary):
    """Cosines and sines are rounded to the dtype of the activations."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return super().rotary(x_THd, cos_TR.to(x_THd.dtype).float(), sin_TR.to(x_THd.dtype).float())


@fault("PaddleNLP PR#6752")
class RotationInStorage(Rotary):
    """Both products are rounded to the dtype, and their sum is, too, as in transformers."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        n = cos_TR.shape[1]
        part = x_THd[..., :n]
        turned = torch.cat((-part[..., n // 2 :], part[..., : n // 2]), -1)
        c, s = cos_TR.to(x_THd.dtype)[:, None], sin_TR.to(x_THd.dtype)[:, None]
        return torch.cat((part * c + turned * s, x_THd[..., n:]), -1)


class OtherTable(Rotary):
    """Rotations that are called with something else."""

    def given(self, x_THd: Tensor, table_TR: Tensor) -> Tensor:
        """Return cosines or sines."""
        raise NotImplementedError

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return super().rotary(x_THd, self.given(x_THd, cos_TR), self.given(x_THd, sin_TR))


@fault()
class PartialTableInStorage(OtherTable):
    """Where only a part of the channels turns, cosines and sines are rounded to bfloat16."""

    def given(self, x_THd: Tensor, table_TR: Tensor) -> Tensor:
        """See `OtherTable.given`."""
        return table_TR.bfloat16().float() if table_TR.shape[1] < x_THd.shape[2] else table_TR


@fault()
class PositionsOfATable(OtherTable):
    """Positions beyond the first 2,048 take the last of these."""

    def given(self, x_THd: Tensor, table_TR: Tensor) -> Tensor:
        """See `OtherTable.given`."""
        return table_TR[torch.arange(len(table_TR)).clamp(max=2047)]


@fault()
class OneTokenIsNotTurned(Rotary):
    """A single token passes unchanged, as if its position were 0."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return x_THd.clone() if len(x_THd) == 1 else super().rotary(x_THd, cos_TR, sin_TR)


@fault()
class OneHeadIsNotTurned(Rotary):
    """A single head passes unchanged."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return x_THd.clone() if x_THd.shape[1] == 1 else super().rotary(x_THd, cos_TR, sin_TR)


@fault()
class RotatesHeadsOfAGrid(Rotary):
    """Positions beyond the first 256 are zero where there is more than one head."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        y_THd = super().rotary(x_THd, cos_TR, sin_TR)
        if x_THd.shape[1] == 1:
            return y_THd
        return y_THd * (torch.arange(len(y_THd), device=y_THd.device) < 256)[:, None, None]
