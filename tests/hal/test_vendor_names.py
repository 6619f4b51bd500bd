# SPDX-License-Identifier: Apache-2.0
"""The core asks a capability, never a name: outside hal/launch no file of it names a vendor or a vendor's library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "hal"
VENDORS = frozenset(
    [
        "nvidia",
        "rocm",
        "hip",
        "ascend",
        "npu",
        "cann",
        "nccl",
        "rccl",
        "hccl",
        "musa",
        "mccl",
        "cublas",
        "cudnn",
        "hipblas",
        "hipblaslt",
        "rocblas",
        "miopen",
        "amd",
        "huawei",
        "alibaba",
        "thead",
        "ppu",
        "mlu",
        "cambricon",
        "xpu",
        "intel",
        "habana",
        "hpu",
        "gaudi",
        "iluvatar",
        "corex",
        "hygon",
        "dcu",
        "metax",
        "moorethreads",
        "kunlunxin",
        "enflame",
        "gcu",
        "tpu",
    ]
)


def words(text: str) -> set[str]:
    """Return the lower-case parts of identifiers and prose: torch_npu is torch and npu, input stays input."""
    split_camel = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text)
    return {re.sub(r"\d+$", "", word) for word in re.split(r"[^a-z0-9]+", split_camel.lower())} | set(
        re.findall(r"t-head", text.lower())
    )


def core_files() -> list[Path]:
    files = [p for p in CORE.rglob("*") if p.suffix in {".py", ".txt"} and "launch" not in p.relative_to(CORE).parts]
    assert len(files) > 30
    return sorted(files)


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_names_no_vendor(path: Path) -> None:
    assert words(path.read_text(encoding="utf-8")) & (VENDORS | {"t-head"}) == set()


@pytest.mark.parametrize(
    "text", ["torch_npu", "PYTORCH_NPU_ALLOC_CONF", "HipError", "nccl2", "the ROCm driver", "T-Head"]
)
def test_the_search_finds_names_inside_identifiers(text: str) -> None:
    assert words(text) & (VENDORS | {"t-head"})


@pytest.mark.parametrize("text", ["input", "relationship", "chip", "scan", "cannot", "spread", "tpupil", "damd"])
def test_the_search_leaves_ordinary_words(text: str) -> None:
    assert not words(text) & VENDORS
