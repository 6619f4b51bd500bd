# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README and of the documentation runs, page by page, in the order of the page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_the_python_blocks_of_a_page_run(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page)))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_blocks_to_run():
    assert sum(len(blocks(page)) for page in PAGES) >= 5


def test_the_table_of_implementations_is_that_of_the_last_run_and_every_reason_is_told():
    page = (ROOT / "docs" / "implementations.md").read_text()
    results = (ROOT / "benchmarks" / "results" / "implementations.md").read_text()
    rows = re.findall(r"^\| (?:transformers|torchtitan|megatron|ling):.*$", results, re.MULTILINE)
    assert len(rows) > 30
    assert [row for row in rows if row not in page.splitlines()] == []
    reasons = {reason.strip() for row in rows for reason in row.split("|")[-2].split(",")}
    assert [reason for reason in sorted(reasons) if f"\n| {reason} | " not in page] == []
