# SPDX-License-Identifier: Apache-2.0
"""Fills the templates of a plug-in package, and puts the package in its place all at once or not at all."""

from __future__ import annotations

import keyword
import os
import re
import tempfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template

import hal
from hal import plugins
from hal.errors import ConfigError


def write_package(name: str, folder: Path, torch_type: str) -> Path:
    """Write a complete plug-in package.

    Args:
        name: of the backend, which `hal.open_device` will take.
        folder: where the package's folder is made; it must exist.
        torch_type: the torch device type; "cpu" makes a rehearsal that runs anywhere.

    Returns:
        The new folder.

    Raises:
        ConfigError: a name that cannot be used, or the folder is there already. Nothing is written then.
    """
    _check_name(name)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", torch_type):
        raise ConfigError(f"no torch device type {torch_type!r}", expected="lower-case letters, digits, underscores")
    module = f"hal_{name}"
    distribution = "hal-" + name.replace("_", "-")
    target = folder / distribution
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", hint="make it first, or leave out --dir")
    if os.path.lexists(target):
        raise ConfigError(f"{target} is there already", hint="another --dir, or remove it")
    values = {
        "name": name,
        "module": module,
        "distribution": distribution,
        "class_name": "".join(part.capitalize() for part in name.split("_")) + "Backend",
        "torch_type": torch_type,
        "hal_version": hal.__version__,
        "api_major": str(hal.PLUGIN_API[0]),
        "api_minor": str(hal.PLUGIN_API[1]),
    }
    files = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{module}/__init__.py": "rehearsal.py.txt" if torch_type == "cpu" else "module.py.txt",
        "tests/test_interface.py": "test.py.txt",
    }
    templates = resources.files("hal.scaffold") / "template"
    with tempfile.TemporaryDirectory(prefix=".hal-new-", dir=folder) as temporary:
        made = Path(temporary) / distribution
        for path, template in files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            text = Template((templates / template).read_text(encoding="utf-8")).substitute(values)
            (made / path).write_text(text, encoding="utf-8")
        (made / module / "py.typed").touch()
        try:
            made.rename(target)
        except OSError as error:  # someone else was faster
            raise ConfigError(f"{target} cannot be made: {error}") from error
    return target


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} is no name for a backend",
            expected="lower-case letters, digits and underscores, beginning with a letter",
        )
    for plugin in plugins.registered():
        if plugin.name == name:
            raise ConfigError(
                f"backend {name!r} is there already, from {', '.join(plugin.owners)}", hint="another name"
            )
    if name in {"auto", "all"} or find_spec(f"hal_{name}") is not None:
        raise ConfigError(f"{name!r} means something else here, or there is a module hal_{name}", hint="another name")
