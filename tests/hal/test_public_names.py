# SPDX-License-Identifier: Apache-2.0
"""Names of the package are imported when they are first used; type checkers, `dir` and `import *` know them before."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hal


def imported_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(hal.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_and_programs_get_the_same_names_from_the_same_modules() -> None:
    homes = imported_for_type_checkers()
    assert sorted(homes) == sorted(hal.__all__)
    for name, home in homes.items():
        assert getattr(hal, name) is getattr(importlib.import_module(home), name)
    assert set(hal.__all__) <= set(dir(hal))


def test_a_name_that_is_none_of_them_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hal' has no attribute 'nonsense'"):
        hal.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from hal import nonsense  # noqa: F401


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = (
        "import sys, hal; print([name for name in sys.modules if name.startswith(('hal.', 'hal_', 'torch', 'numpy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_start_of_a_run_imports_no_torch_and_none_of_what_takes_longest() -> None:
    code = ("import sys, hal.cli.main, hal.cli.run\n"
            "print([name for name in ('torch', 'numpy', 'importlib.metadata', 'rich', 'psutil', 'hal.registry',"
            " 'hal.launch.report') if name in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
