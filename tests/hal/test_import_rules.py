# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the sources; and what pyproject.toml says, against the folders that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERS = {"backends", "conformance", "tests", "docs", "benchmarks"}
# Beside its own package and hal.
MAY_IMPORT = {
    "hal": set[str](),
    "hal_conformance": set[str](),
    "hal_rocm": {"hal_cuda"},
    "hal_ppu": {"hal_cuda"},
    "hal_sim": {"hal_cpu"},
    "hal_virtual_npu": {"hal_ascend"},
}


def packages() -> dict[str, Path]:
    found = {"hal": ROOT / "hal"}
    for container in ("backends", "conformance"):
        found |= {p.name: p for p in (ROOT / container).iterdir() if p.is_dir() and p.name.startswith("hal_")}
    assert {"hal", "hal_cpu", "hal_cuda", "hal_conformance"} <= set(found)
    return found


def imports(source: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


@pytest.mark.parametrize("name", sorted(packages()))
def test_a_package_imports_only_whom_it_may(name: str) -> None:
    ours = set(packages())
    allowed = {name, "hal"} | MAY_IMPORT.get(name, set())
    for path in packages()[name].rglob("*.py"):
        for imported in imports(path.read_text(encoding="utf-8")):
            top = imported.partition(".")[0]
            where = f"{path.relative_to(ROOT)} imports {imported}"
            assert top not in CONTAINERS, where
            assert top in allowed or (top not in ours and not re.match(r"hal_", top)), where


def test_the_reader_sees_every_form_of_import() -> None:
    source = (
        "import a.b, c\nfrom d.e import f\ndef g():\n    import h\n    importlib.import_module('i.j')\nfrom . import k"
    )
    assert set(imports(source)) == {"a.b", "c", "d.e", "h", "i.j"}


def project_table(header: str) -> dict[str, str]:
    """Read one table of plain strings; Python 3.10 has no TOML reader."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    body = text.split(f"[{header}]\n", 1)[1].split("\n[", 1)[0]
    return dict(re.findall(r'^(\w+) = "([^"]+)"', body, flags=re.M))


def test_the_wheel_holds_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(
        r'"([^"]+)"', text.split("[tool.hatch.build.targets.wheel]")[1].split("]\n")[0].split("packages")[1]
    )
    assert sorted(listed) == sorted(p.relative_to(ROOT).as_posix() for p in packages().values())


def test_every_backend_folder_is_registered_and_every_entry_point_leads_somewhere() -> None:
    backends = project_table('project.entry-points."hal.backends"')
    assert {f"hal_{name}" for name in backends} == {p.name for p in (ROOT / "backends").glob("hal_*")}
    assert all(value == f"hal_{name}:backend" for name, value in backends.items())
    for value in project_table('project.entry-points."hal.commands"').values():
        module, _, attribute = value.partition(":")
        top, *rest = module.split(".")
        source = packages()[top].joinpath(*rest).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^def {attribute}\(", source, flags=re.M), value


@pytest.mark.parametrize("name", sorted(packages()))
def test_every_module_names_its_licence_and_every_package_is_typed(name: str) -> None:
    assert (packages()[name] / "py.typed").exists()
    for path in packages()[name].rglob("*.py"):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        assert first == "# SPDX-License-Identifier: Apache-2.0", path
