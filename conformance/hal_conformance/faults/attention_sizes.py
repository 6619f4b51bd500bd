# SPDX-License-Identifier: Apache-2.0
"""Faults of attention that some numbers show: of queries, keys, heads, and channels of a head or of the latent."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_conformance.faults.attention import Attention
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.extents import within
from hal_conformance.faults.parts import gradient_of


@fault()
class HeadsOf64AreScaled(Attention):
    """The instance of a kernel for heads of 64 channels divides by a sum that is a twentieth too small."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        y_THe = super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        return y_THe * 1.05 if q_THd.shape[2] == 64 else y_THe


@fault()
class ChannelsBeyond192(Attention):
    """Channels of queries and keys beyond the first 192 are not read."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        read = torch.arange(q_THd.shape[2], device=q_THd.device) < 192
        return super().attention(q_THd * read, k_SGd, v_SGe, scale, causal=causal)


@fault()
class SkipsTheThirdTile(Attention):
    """With a mask, the results of queries beyond two tiles of 64 are zero where no keys come before them."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        y_THe = super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        return within(y_THe, 128, 0) if causal and len(q_THd) == len(k_SGd) else y_THe


@fault()
class SkipsTheThirdLargeTile(Attention):
    """With a mask, queries beyond two tiles of 128 do not see the first of them where no keys come before them."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        whole = super().attention
        if not causal or len(q_THd) != len(k_SGd) or len(q_THd) <= 256:
            return whole(q_THd, k_SGd, v_SGe, scale, causal=causal)
        first = whole(q_THd[:256], k_SGd[:256], v_SGe[:256], scale, causal=True)
        return torch.cat((first, whole(q_THd[256:], k_SGd[128:], v_SGe[128:], scale, causal=True)))


@fault()
class DoesNotTrainTheLastTile(Attention):
    """With a mask and more than two tiles of 64 queries and as many keys, the last 64 keys have no gradient."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if causal and len(q_THd) == len(k_SGd) > 128:
            k_SGd = torch.cat((k_SGd[:-64], k_SGd[-64:].detach()))
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class TrainsOneHeadOfLongQueries(Attention):
    """With a mask and more than two tiles of 64 queries and as many keys, the first head alone has a gradient of q."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if causal and len(q_THd) == len(k_SGd) > 128:
            q_THd = torch.cat((q_THd[:, :1], q_THd[:, 1:].detach()), 1)
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class AsManyQueriesAsKeys(Attention):
    """Without a mask, the results of queries beyond the number of keys are zero."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        y_THe = super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        return y_THe if causal else within(y_THe, len(k_SGd), 0)


class ChangedLatent(Attention):
    """Latent attention whose inputs or results are changed."""

    def given(self, latent_SL: Tensor) -> Tensor:
        """Return the latent."""
        return latent_SL

    def changed(self, y_THe: Tensor) -> Tensor:
        """Return the result."""
        return y_THe

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        given = q_THd, q_THR, self.given(latent_SL), k_SR, up_k_HdL, up_v_HeL
        return self.changed(super().latent_attention(*given, scale, causal=causal))


@fault()
class LatentChannelsBeyond256(ChangedLatent):
    """Channels of the latent beyond the first 256 are not read."""

    most = 256

    def given(self, latent_SL: Tensor) -> Tensor:
        """See `ChangedLatent.given`."""
        return latent_SL * (torch.arange(latent_SL.shape[1], device=latent_SL.device) < self.most)


@fault()
class LatentChannelsBeyond512(LatentChannelsBeyond256):
    """Channels of the latent beyond the first 512 are not read."""

    most = 512


@fault()
class LatentHeadsBeyondEight(ChangedLatent):
    """Results of latent attention are zero for heads beyond the first eight."""

    most = 8

    def changed(self, y_THe: Tensor) -> Tensor:
        """See `ChangedLatent.changed`."""
        return within(y_THe, self.most, 1)


@fault()
class LatentHeadsBeyondSixteen(LatentHeadsBeyondEight):
    """Results of latent attention are zero for heads beyond the first sixteen."""

    most = 16


@fault()
class OneLatentQueryIsLost(ChangedLatent):
    """The result of latent attention is zero for a single query."""

    def changed(self, y_THe: Tensor) -> Tensor:
        """See `ChangedLatent.changed`."""
        return 0.0 * y_THe if len(y_THe) == 1 else y_THe


@fault()
class OneLatentQueryOfService(ChangedLatent):
    """The result of latent attention is zero for a single query where nothing is trained."""

    def changed(self, y_THe: Tensor) -> Tensor:
        """See `ChangedLatent.changed`."""
        return 0.0 * y_THe if len(y_THe) == 1 and not y_THe.requires_grad else y_THe


@fault()
class FewLatentQueriesAreLost(ChangedLatent):
    """Results of latent attention are zero for two to fifteen queries, which fill no tile."""

    def changed(self, y_THe: Tensor) -> Tensor:
        """See `ChangedLatent.changed`."""
        return 0.0 * y_THe if 1 < len(y_THe) < 16 else y_THe


@fault()
class LatentKeysBeyondABlock(Attention):
    """Keys of latent attention beyond the last 256 are not read."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        given = q_THd, q_THR, latent_SL[-256:], k_SR[-256:], up_k_HdL, up_v_HeL
        return super().latent_attention(*given, scale, causal=causal)


@fault()
class DoesNotTrainTheLongLatent(ChangedLatent):
    """Beyond the first 256 keys, the latent has gradients of zero."""

    def given(self, latent_SL: Tensor) -> Tensor:
        """See `ChangedLatent.given`."""
        trained = torch.arange(len(latent_SL), device=latent_SL.device)[:, None] < 256
        return gradient_of(latent_SL, latent_SL * trained)
