# SPDX-License-Identifier: Apache-2.0
"""Fills the templates of a plug-in package, and puts the package in its place all at once or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template

import hal
from hal import plugins
from hal.backend_name import LONGEST, fault_of, is_word
from hal.errors import ConfigError


def write_package(name: str, folder: Path, torch_type: str) -> Path:
    """Write a complete plug-in package.

    Args:
        name: of the backend, which `hal.open_device` will take.
        folder: where the package's folder is made; it must exist.
        torch_type: the torch device type; "cpu" makes a rehearsal that runs anywhere, another one that torch has built
            in a backend for a chip that answers to it.

    Returns:
        The new folder.

    Raises:
        ConfigError: a name that cannot be used, or a folder that is there already or cannot be written. Nothing is
            left behind then.
    """
    _check_name(name)
    if not is_word(torch_type):
        raise ConfigError(f"no torch device type {torch_type!r}", expected="lower-case letters, digits, underscores")
    module = f"hal_{name}"
    distribution = "hal-" + name.replace("_", "-")
    target = folder / distribution
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
        "pyproject.toml": _filled("pyproject.toml.txt", values),
        "README.md": _filled("README.md.txt", values),
        f"{module}/__init__.py": _filled(_module_template(torch_type), values),
        f"{module}/py.typed": "",
        "tests/test_interface.py": _filled("test.py.txt", values),
    }
    try:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder", hint="make it first, or leave out --dir")
        if os.path.lexists(target):
            raise ConfigError(f"{target} is there already", hint="another --dir, or remove it")
        with tempfile.TemporaryDirectory(prefix=".hal-new-", dir=folder) as temporary:
            made = Path(temporary) / distribution
            for path, text in files.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text, encoding="utf-8")
            made.rename(target)
    except OSError as error:  # no permission, no space, or someone else was faster
        raise ConfigError(f"{target} cannot be made: {error}", hint="another --dir") from error
    return target


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = (resources.files("hal.scaffold") / "template" / template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _module_template(torch_type: str) -> str:
    if torch_type == "cpu":
        return "rehearsal.py.txt"
    # torch has a module for each device type of its own. Its folder shows that without an import of seconds.
    torch = find_spec("torch")
    own = torch is not None and torch.origin is not None and (Path(torch.origin).parent / torch_type).is_dir()
    return "own_type.py.txt" if own else "module.py.txt"


def _check_name(name: str) -> None:
    fault = fault_of(name)
    if fault is not None:
        raise ConfigError(f"{name[: 2 * LONGEST]!r} is no name for a backend: it {fault}", hint="another name")
    for plugin in plugins.registered():
        if plugin.name == name:
            raise ConfigError(
                f"backend {name!r} is there already, from {', '.join(plugin.owners)}", hint="another name"
            )
    if find_spec(f"hal_{name}") is not None:
        raise ConfigError(f"there is a module hal_{name}", hint="another name")
