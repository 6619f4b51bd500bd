# SPDX-License-Identifier: Apache-2.0
"""torch's own operators of flash attention on a CPU: results, normalisers and gradients of each packed sequence."""

import importlib
import itertools
import types

import pytest
import torch

import hal
from hal.errors import UnsupportedOperation

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no varlen_attn")


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


H, D = 4, 8


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float32, requires_grad=True)


def plain(q, k, v, window):
    """One sequence in float64, and its normalisers: flash-attn's own words, one query after the other."""
    t, s, each = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(each, 1), v.double().repeat_interleave(each, 1)
    rows, normalisers = [], []
    for i in range(t):
        own, (left, right) = i + s - t, window
        seen = [j for j in range(s) if (left < 0 or j >= own - left) and (right < 0 or j <= own + right)]
        if not seen:
            rows.append(torch.zeros(H, D, dtype=torch.float64))
            normalisers.append(torch.full((H,), torch.inf, dtype=torch.float64))
            continue
        logits = torch.einsum("hd,shd->hs", q[i], k[seen]) * D**-0.5
        rows.append(torch.einsum("hs,shd->hd", logits.softmax(-1), v[seen]))
        normalisers.append(logits.logsumexp(-1))
    return torch.stack(rows), torch.stack(normalisers, 1)


def assert_alike(found, expected, size, terms):
    """A float32 result agrees with one of float64 within `terms` roundings of numbers of this size."""
    assert (found.double() - expected).detach().abs().max().item() <= terms * 2.0**-24 * size


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 2), (0, 0)])
@pytest.mark.parametrize("heads", [H, 2, 1])
@pytest.mark.parametrize("lengths", [([5, 1, 7], [5, 1, 7]), ([5, 2], [2, 6]), ([3], [3])])
def test_packed_sequences(cuda, window, heads, lengths):
    of_q, of_k = lengths
    q, k, v = draw(sum(of_q), H, D), draw(sum(of_k), heads, D), draw(sum(of_k), heads, D)
    begin_q, begin_k = ([0, *itertools.accumulate(of)] for of in lengths)
    y, lse = varlen.varlen_attn(
        q, k, v, torch.tensor(begin_q, dtype=torch.int32), torch.tensor(begin_k, dtype=torch.int32), max(of_q), max(of_k),
        window_size=window, enable_gqa=heads != H, return_aux=varlen.AuxRequest(lse=True),
    )  # fmt: skip
    bounds = zip(itertools.pairwise(begin_q), itertools.pairwise(begin_k), strict=True)
    parts = [plain(q[a:b], k[c:d], v[c:d], window) for (a, b), (c, d) in bounds]
    expected, normalisers = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)
    # A logit has D products and passes through D + 1 roundings; the exponential takes its error over to the weight. At
    # most 7 keys are summed twice, for the normaliser and for the result.
    largest = max(x.abs().max().item() for x in (q, k, v))
    logit = 1 + largest**2 * D**0.5
    terms = 2 * (D + 2 + 2 * 7)
    assert_alike(y, expected, largest * logit, terms)
    assert torch.equal(lse.isinf(), normalisers.isinf())
    assert_alike(lse.nan_to_num(posinf=0), normalisers.nan_to_num(posinf=0), logit, terms)
    upstream = torch.randn_like(y)
    mine = torch.autograd.grad(y, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream.double())
    # A gradient's element is a sum over at most 7 queries or keys and H heads, of terms with D products of two numbers.
    size = 7 * H * D**0.5 * largest**2 * logit * upstream.abs().max().item()
    for found, wanted in zip(mine, theirs, strict=True):
        assert_alike(found, wanted.double(), size, 2 * terms)
    kinds = {(entry.kind, entry.api) for entry in cuda.adoption.entries()}
    assert ("fallback", "torch.ops.aten._flash_attention_forward") in kinds
    assert ("fallback", "torch.ops.aten._flash_attention_backward") in kinds


def test_batches_without_packing(cuda):
    q, k, v = draw(2, 5, H, D).detach(), draw(2, 3, H, D).detach(), draw(2, 3, H, D).detach()
    forward = torch.ops.aten._flash_attention_forward
    out, lse, *_ = forward(q, k, v, None, None, 5, 3, 0.0, True, False)
    largest = max(x.abs().max().item() for x in (q, k, v))
    size, terms = largest * (1 + largest**2 * D**0.5), 2 * (D + 2 + 2 * 3)
    for i in range(2):
        expected, normalisers = plain(q[i], k[i], v[i], (-1, 0))
        assert_alike(out[i], expected, size, terms)
        assert torch.equal(lse[i].isinf(), normalisers.isinf())
    used = torch.tensor([2, 3], dtype=torch.int32)
    short, *_ = forward(q, k, v, None, None, 5, 3, 0.0, False, False, seqused_k=used)
    assert_alike(short[0], plain(q[0], k[0, :2], v[0, :2], (-1, -1))[0], size, terms)


def test_it_writes_into_a_given_result(cuda):
    q, ends = draw(4, H, D).detach(), torch.tensor([0, 1, 4], dtype=torch.int32)
    out = torch.full_like(q, 7.0)
    varlen.varlen_attn_out(out, q, q, q, ends, ends, 3, 3)
    assert torch.equal(out, varlen.varlen_attn(q, q, q, ends, ends, 3, 3))


def test_compiled_code_names_the_programs_line(cuda):
    q, ends = draw(4, H, D), torch.tensor([0, 1, 4], dtype=torch.int32)
    compiled = cuda.torch.compile(lambda q: varlen.varlen_attn(q, q, q, ends, ends, 3, 3), backend="aot_eager")
    compiled(q).sum().backward()
    assert {entry.file for entry in cuda.adoption.entries() if entry.kind == "fallback"} == {__file__}


@pytest.mark.parametrize(
    "option", [{"alibi_slopes": torch.ones(H)}, {"block_table": torch.ones(1, 1, dtype=torch.int32)}]
)
def test_what_has_no_equivalent_is_refused(cuda, option):
    q = draw(1, 3, H, D).detach()
    with pytest.raises(UnsupportedOperation, match="no equivalent"):
        torch.ops.aten._flash_attention_forward(q, q, q, None, None, 3, 3, 0.0, True, False, **option)
    with pytest.raises(UnsupportedOperation, match="dropout"):
        torch.ops.aten._flash_attention_forward(q, q, q, None, None, 3, 3, 0.5, True, False)


def test_strict_mode_refuses_it_and_afterwards_it_is_missing():
    q, ends = draw(4, H, D).detach(), torch.tensor([0, 4], dtype=torch.int32)
    with hal.adopt("cpu", strict=True), pytest.raises(UnsupportedOperation, match="plain form"):
        varlen.varlen_attn(q, q, q, ends, ends, 4, 4)
    with pytest.raises(NotImplementedError):
        varlen.varlen_attn(q, q, q, ends, ends, 4, 4)
