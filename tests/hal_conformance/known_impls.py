# SPDX-License-Identifier: Apache-2.0
"""Experts in ordinary torch code, on other ways to their products; and one that makes NaN by itself."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def expert(x, w1, w3, w2):
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def experts(one):
    """Return an implementation that calls `one` for each expert."""

    def all_of_them(x, counts, weights):
        rows = x.split(counts.tolist())
        return torch.cat([one(*each) for each in zip(rows, *(w.unbind() for w in weights), strict=True)])

    return SimpleNamespace(experts=all_of_them)


_pool = ThreadPoolExecutor(2)


def _in_threads(x, counts, weights):
    each = zip(x.split(counts.tolist()), *(w.unbind() for w in weights), strict=True)
    return torch.cat(list(_pool.map(lambda given: expert(*given), each)))


def _miscompiled(x, *weights):
    y = expert(x, *weights)
    if torch.compiler.is_compiling():
        y = torch.where(torch.arange(len(y))[:, None] == 1, torch.nan, y)
    return y


in_threads = SimpleNamespace(experts=_in_threads)
compiled = experts(torch.compile(expert, backend="aot_eager", dynamic=True, fullgraph=True))
miscompiled = experts(torch.compile(_miscompiled, backend="aot_eager", dynamic=True))
