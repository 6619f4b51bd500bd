# SPDX-License-Identifier: Apache-2.0
"""Every case of the suite, by name."""

from __future__ import annotations

from hal_conformance.case import Case
from hal_conformance.cases import (
    attention,
    attention_sums,
    band,
    combine,
    contract,
    determinism,
    dispatch,
    experts,
    experts_backward,
    experts_exact,
    experts_sweep,
    fp8,
    gradients,
    head,
    layer,
    layer_edges,
    layer_exact,
    loss_parts,
    losses,
    norm,
    optimizer,
    paired,
    rotary,
    router,
    router_backward,
    router_edges,
    step,
    stores,
    trained,
)

ALL: tuple[Case, ...] = (
    *contract.CASES,
    *stores.CASES,
    *router.CASES,
    *router_edges.CASES,
    *router_backward.CASES,
    *dispatch.CASES,
    *experts_exact.CASES,
    *experts_sweep.CASES,
    *experts_backward.CASES,
    *experts.CASES,
    *combine.CASES,
    *losses.CASES,
    *loss_parts.CASES,
    *layer.CASES,
    *layer_edges.CASES,
    *layer_exact.CASES,
    *trained.CASES,
    *determinism.CASES,
    *norm.CASES,
    *rotary.CASES,
    *attention.CASES,
    *attention_sums.CASES,
    *head.CASES,
    *gradients.CASES,
    *optimizer.CASES,
    *fp8.CASES,
    *step.CASES,
    *band.CASES,
    *paired.CASES,
)


def by_name(name: str) -> Case:
    """Return the case of that name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME = {case.name: case for case in ALL}
