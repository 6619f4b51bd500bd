# SPDX-License-Identifier: Apache-2.0
"""What stands in for libraries of CUDA kernels does what these say, is found only where nothing else is, and is told."""

import importlib
import importlib.util
import inspect
import sys
from importlib import metadata

import pytest
import torch

import hal
from hal.errors import UnsupportedOperation


@pytest.fixture
def adoption():
    with hal.adopt("cpu") as adoption:
        yield adoption


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attention(q, k, v, scale=None, causal=False, window=(-1, -1)):
    """flash-attn's own words, one query after the other."""
    t, s, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left, right = window
    rows = []
    for i in range(t):
        own = i + s - t
        last = own if causal else s - 1 if right < 0 else own + right
        first = 0 if left < 0 else own - left
        seen = [j for j in range(s) if first <= j <= last]
        heads = []
        for h in range(q.shape[2]):
            if not seen:
                heads.append(torch.zeros_like(q[:, i, h, : v.shape[-1]]))
                continue
            p = (scale * torch.einsum("bd,bsd->bs", q[:, i, h], k[:, seen, h // group])).softmax(-1)
            heads.append(torch.einsum("bs,bsd->bd", p, v[:, seen, h // group]))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1)


def assert_alike(found, expected, size, terms=64):
    """Two results of float64 agree within the rounding of both, 2 terms u size.

    A result passes through fewer than `terms` roundings of numbers up to `size`: sums over at most 8 channels and 7 keys,
    an exponential of a logit that has 10 roundings itself, a normaliser; twice as many in the backward pass.
    """
    assert (found - expected).detach().abs().max().item() <= 2 * terms * 2.0**-53 * size.item()


def size_of(q, k, v, upstream=1.0):
    """Return what bounds every number inside: sums of absolute values of logits, values and their products."""
    logits = 1 + q.abs().max() * k.abs().max() * 8
    return (
        logits
        * (1 + v.abs().max() * 8)
        * (1 + q.detach().abs().max() + k.detach().abs().max())
        * torch.as_tensor(upstream).abs().sum()
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, 0), (3, -1), (-1, 0)])
@pytest.mark.parametrize(("t", "s", "heads", "groups"), [(5, 5, 2, 2), (3, 7, 4, 2), (7, 3, 2, 1), (1, 4, 1, 1)])
def test_attention_is_that_of_the_library(causal, window, t, s, heads, groups, adoption):
    flash = importlib.import_module("flash_attn")
    q, k, v = draw(2, t, heads, 8), draw(2, s, groups, 8), draw(2, s, groups, 8)
    y = flash.flash_attn_func(q, k, v, softmax_scale=0.4, causal=causal, window_size=window)
    expected = attention(q, k, v, 0.4, causal, window)
    assert_alike(y, expected, size_of(q, k, v))
    upstream = torch.randn_like(y)
    for mine, theirs in zip(torch.autograd.grad(y, (q, k, v), upstream),
                            torch.autograd.grad(expected, (q, k, v), upstream), strict=True):  # fmt: skip
        assert_alike(mine, theirs, size_of(q, k, v, upstream), terms=128)


def test_packed_forms_and_sequences_of_other_lengths(adoption):
    flash = importlib.import_module("flash_attn")
    qkv = draw(2, 4, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    expected = attention(q, k, v, causal=True)
    for y in (flash.flash_attn_qkvpacked_func(qkv, causal=True),
              flash.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True)):  # fmt: skip
        assert_alike(y, expected, size_of(q, k, v))
    padding = importlib.import_module("flash_attn.bert_padding")
    kept = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    rows, indices, ends, longest, used = padding.unpad_input(q, kept)
    assert (ends.tolist(), longest, used.tolist()) == ([0, 2, 6], 4, [2, 4])
    packed = [padding.unpad_input(x, kept)[0] for x in (q, k, v)]
    y = padding.pad_input(flash.flash_attn_varlen_func(*packed, ends, ends, 4, 4, causal=True), indices, 2, 4)
    assert_alike(y[0, :2], attention(q[:1, :2], k[:1, :2], v[:1, :2], causal=True)[0], size_of(q, k, v))
    assert_alike(y[1], attention(q[1:], k[1:], v[1:], causal=True)[0], size_of(q, k, v))
    assert not y[0, 2:].any()
    assert torch.equal(padding.pad_input(packed[0], indices.int(), 2, 4), padding.pad_input(packed[0], indices, 2, 4))
    assert torch.equal(rows, packed[0])


def test_keys_in_a_cache(adoption):
    flash = importlib.import_module("flash_attn")
    shapes = (2, 2, 2, 8), (3, 6, 1, 8), (3, 6, 1, 8), (2, 2, 1, 8), (2, 2, 1, 8)
    q, k, v, new_k, new_v = (draw(*shape).detach() for shape in shapes)
    held, places = torch.tensor([1, 3], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    y = flash.flash_attn_with_kvcache(
        q, k, v, new_k, new_v, cache_seqlens=held, cache_batch_idx=places, causal=True, window_size=(2, -1)
    )
    for i, (place, length) in enumerate(zip(places.tolist(), held.tolist(), strict=True)):
        end = length + 2
        assert torch.equal(k[place, length:end], new_k[i])
        assert torch.equal(v[place, length:end], new_v[i])
        one = q[i, None], k[place, None, :end], v[place, None, :end]
        assert_alike(y[i], attention(*one, causal=True, window=(2, -1))[0], size_of(*one))
    whole = flash.flash_attn_with_kvcache(q, k[:2], v[:2])
    assert_alike(whole, attention(q, k[:2], v[:2]), size_of(q, k, v))
    with pytest.raises(UnsupportedOperation, match="paged keys"):
        flash.flash_attn_with_kvcache(q, k, v, block_table=places)


def test_packed_sequences_in_one_tensor(adoption):
    flash = importlib.import_module("flash_attn")
    qkv, ends = draw(5, 3, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = qkv.unbind(1)
    expected = flash.flash_attn_varlen_func(q, k, v, ends, ends, 3, 3, causal=True)
    assert torch.equal(flash.flash_attn_varlen_qkvpacked_func(qkv, ends, 3, causal=True), expected)
    kv = torch.stack([k, v], 1)
    assert torch.equal(flash.flash_attn_varlen_kvpacked_func(q, kv, ends, ends, 3, 3, causal=True), expected)


@pytest.mark.parametrize("option", [{"softcap": 1.0}, {"alibi_slopes": torch.ones(2)}, {"return_attn_probs": True}])
def test_what_torch_has_no_equivalent_of_is_refused(option, adoption):
    flash = importlib.import_module("flash_attn")
    q = draw(1, 2, 2, 8)
    with pytest.raises(UnsupportedOperation, match=next(iter(option))):
        flash.flash_attn_func(q, q, q, **option)


@pytest.mark.parametrize(
    ("statement", "says"),
    [("from apex import amp", "no such part of apex"), ("from apex.optimizers import FusedLAMB", "FusedLAMB.*torch.optim"),
     ("import apex.parallel", "no such part of apex"), ("from flash_attn.layers import rotary", "scaled_dot_product"),
     ("from flash_attn import flash_attn_3_func", "flash_attn_3_func.*scaled_dot_product"),
     ("import flash_attn_2_cuda", "there is no flash_attn_2_cuda"), ("import triton.language", "there is no triton")],
)  # fmt: skip
def test_a_part_that_is_missing_is_an_error_that_says_what_to_use(statement, says, adoption):
    if statement.startswith("import triton") and importlib.util.find_spec("triton"):
        pytest.skip("triton is installed")
    with pytest.raises(ImportError, match=says):
        exec(statement, {"__name__": "program"})
    assert not hasattr(importlib.import_module("apex"), "amp")


def test_grouped_products(adoption):
    gmm = importlib.import_module("grouped_gemm").ops.gmm
    a, b, sizes = draw(6, 3), draw(3, 3, 4), torch.tensor([2, 0, 4])
    expected = torch.cat([a[:2] @ b[0], a[2:] @ b[2]])
    assert torch.equal(gmm(a, b, sizes), expected)
    assert torch.equal(gmm(a, b.transpose(1, 2), sizes, trans_b=True), expected)
    weights = gmm(a, expected, sizes, trans_a=True)
    assert weights.shape == (3, 3, 4)
    assert torch.equal(weights[2], a[2:].t() @ expected[2:])
    assert not weights[1].any()
    with pytest.raises(ValueError, match="exclude"):
        gmm(a, b, sizes, True, True)


def test_apexs_norms_and_optimisers(adoption):
    apex = importlib.import_module("apex")
    norm = importlib.import_module("apex.normalization").MixedFusedRMSNorm(4)
    assert norm(torch.ones(2, 4, dtype=torch.bfloat16)).dtype is torch.float32
    assert torch.equal(apex.normalization.FusedLayerNorm(4)(torch.ones(2, 4)), torch.nn.LayerNorm(4)(torch.ones(2, 4)))
    for adam_w_mode, theirs in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        a, b = (torch.nn.Parameter(torch.ones(3)) for _ in "ab")
        mine = apex.optimizers.FusedAdam([a], lr=0.1, weight_decay=0.3, adam_w_mode=adam_w_mode)
        other = theirs([b], lr=0.1, weight_decay=0.3)
        for x, optimizer in ((a, mine), (b, other)):
            for _ in range(3):
                x.grad = torch.tensor([1.0, -2.0, 3.0])
                optimizer.step()
        assert torch.equal(a, b)
    assert apex.optimizers.FusedAdam([a]).defaults["weight_decay"] == 0
    with pytest.raises(UnsupportedOperation, match="bias_correction"):
        apex.optimizers.FusedAdam([a], bias_correction=False)
    with pytest.raises(ImportError, match="FusedLAMB"):
        from apex.optimizers import FusedLAMB  # noqa: F401
    with pytest.raises(ImportError):
        from apex import amp  # noqa: F401


def test_apexs_functions_of_norms(adoption):
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    x, weight, bias, upstream = draw(3, 8), draw(8), draw(8), draw(3, 8).detach()
    for mine, theirs in (
        (norms.FusedLayerNormAffineFunction.apply(x, weight, bias, 8, 1e-5),
         torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5)),
        (norms.fused_layer_norm_affine(x, weight, bias, torch.Size([8]), 1e-5, True),
         torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5)),
        (norms.mixed_dtype_fused_layer_norm_affine(x, weight, bias, 8, 1e-5),
         torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5)),
        (norms.fused_layer_norm(x, 8, 1e-5) * weight, torch.nn.functional.layer_norm(x, (8,), eps=1e-5) * weight),
        (norms.fused_rms_norm(x, 8, 1e-5) * weight, torch.nn.functional.rms_norm(x, (8,), eps=1e-5) * weight),
        (norms.mixed_dtype_fused_rms_norm_affine(x, weight, 8, 1e-5),
         torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)),
        (norms.fused_rms_norm_affine(x, weight, (8,), 1e-5), torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)),
    ):  # fmt: skip
        assert torch.equal(mine, theirs)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (mine, theirs)), strict=True):
            assert torch.equal(a, b)
    assert norms.FusedRMSNorm is importlib.import_module("apex.normalization").FusedRMSNorm
    # Megatron asks for this argument by name before it gives it.
    assert "memory_efficient" in inspect.signature(norms.FusedLayerNormAffineFunction.forward).parameters


def test_kernels_of_a_triton_without_a_driver_are_refused_with_a_hint(tmp_path, monkeypatch):
    package = tmp_path / "triton"
    (package / "runtime").mkdir(parents=True)
    (package / "__init__.py").write_text("from triton.runtime import driver\n")
    (package / "runtime" / "__init__.py").write_text("")
    (package / "runtime" / "driver.py").write_text(
        "def _create_driver():\n    raise RuntimeError('0 active drivers ([]). There should only be one.')\n\n"
        "def active():\n    return _create_driver()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    with hal.adopt("cpu") as adoption:
        triton = importlib.import_module("triton")
        with pytest.raises(UnsupportedOperation, match=r"no driver for cpu(.|\n)*torch.compile writes kernels"):
            triton.driver.active()
        assert [entry.api for entry in adoption.entries() if entry.kind == "refused"] == ["triton"]
    with pytest.raises(RuntimeError, match="0 active drivers"):
        triton.driver.active()
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        sys.modules.pop(name)


def test_it_is_a_change_of_meaning_at_the_programs_line_and_refused_in_strict_mode():
    q = draw(1, 2, 1, 8)
    with hal.adopt("cpu") as adoption:
        importlib.import_module("flash_attn").flash_attn_func(q, q, q)
        (change,) = [entry for entry in adoption.entries() if entry.kind == "change"]
        assert change.file == __file__
        assert change.api == "flash_attn.flash_attn_func"
    with hal.adopt("cpu", strict=True), pytest.raises(UnsupportedOperation, match="torch's attention"):
        importlib.import_module("flash_attn").flash_attn_func(q, q, q)


@pytest.mark.parametrize(
    "library", ["flash_attn.bert_padding", "apex.normalization.fused_layer_norm", "grouped_gemm.ops"]
)
def test_all_of_its_names_are_the_librarys(library, adoption):
    names = {"__name__": "program"}
    exec(f"from {library} import *", names)
    given = {name: value for name, value in names.items() if not name.startswith("__")}
    assert given
    assert {value.__module__.partition(".")[0] for value in given.values()} == {"hal"}  # none of torch's
    assert not {"torch", "F", "Any", "annotations", "stands_in", "refuse"} & set(given)


def test_it_is_there_only_while_a_device_is_adopted():
    with hal.adopt("cpu"):
        assert importlib.util.find_spec("flash_attn") is not None
        assert importlib.util.find_spec("flash_attn.no_such_module") is None
        importlib.import_module("flash_attn.bert_padding")
    assert importlib.util.find_spec("flash_attn") is None
    assert not [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "apex", "grouped_gemm")]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


def test_its_version_is_known_while_a_device_is_adopted():
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("flash-attn")
    with hal.adopt("cpu"):
        assert metadata.version("flash-attn") == metadata.version("flash_attn") == "2.8.3"
        assert metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        assert metadata.version("torch")
        assert "apex" not in metadata.packages_distributions()  # which has no versions
    assert "flash_attn" not in metadata.packages_distributions()


def test_a_library_that_is_installed_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "apex.py").write_text("theirs = True\n")
    (tmp_path / "flash_attn.py").write_text("theirs = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hal.adopt("cpu"):
        assert "flash_attn" not in metadata.packages_distributions()
        assert importlib.import_module("apex").theirs
    sys.modules.pop("apex")


def test_a_plug_in_brings_its_own(tmp_path, monkeypatch):
    (tmp_path / "their_kernels.py").write_text("__version__ = '7'\n\ndef product():\n    return 42\n")
    info = tmp_path / "dist_their-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dist-their\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hal.replacements]\ndeep_gemm = their_kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hal.adopt("cpu"):
        found = importlib.import_module("deep_gemm")
        assert (found.product(), found.__version__) == (42, "7")
