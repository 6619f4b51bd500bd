# SPDX-License-Identifier: Apache-2.0
"""Whether `import torch` works here, found out in child processes, since it may raise, hang or end the process.

torch imports every plug-in of the entry-point group `torch.backends` while it is itself imported, so one of them
that raises makes `import torch` fail for everyone, whatever device they want.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import util

from hal import entry_points
from hal._process import Ending, run_python
from hal.autoload import AUTOLOAD

TORCH_PLUGINS = "torch.backends"

_IMPORT = 'import torch, json; print("\\nhal-torch " + json.dumps(str(torch.__version__)))'
_LOAD_ONE = "import torch, importlib.metadata as m; m.EntryPoint(*sys.argv[1:], 'torch.backends').load()()"


@dataclass(frozen=True)
class AutoloadPlugin:
    """One plug-in that `import torch` loads.

    Attributes:
        name, value: of its entry point.
        owner: the distribution.
        fault: what happened when it alone was loaded; None if nothing did, or if it could not be tried.
    """

    name: str
    value: str
    owner: str
    fault: str | None


@dataclass(frozen=True)
class TorchState:
    """What became of `import torch`.

    Attributes:
        installed: there is a module of this name.
        version: as torch tells it, or None if it cannot be imported even alone.
        fault: what happened to `import torch` without plug-ins, or None.
        autoload_fault: what happened to it with plug-ins, or None.
        plugins: everyone in the group.
    """

    installed: bool
    version: str | None
    fault: str | None
    autoload_fault: str | None
    plugins: tuple[AutoloadPlugin, ...]

    def as_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        return asdict(self)

    def problems(self) -> list[str]:
        """Return what is wrong, with what to do about it."""
        if not self.installed:
            return ["torch is not installed; try: pip install 'torch>=2.7', or your vendor's build of it"]
        if self.fault is not None:
            return [f"`import torch` fails even without plug-ins: {self.fault}; try: reinstall torch"]
        if self.autoload_fault is None:
            return []
        guilty = [plugin for plugin in self.plugins if plugin.fault is not None]
        return [
            f"`import torch` fails: {self.autoload_fault}",
            *(f"torch's plug-in {p.name!r} ({p.value} of {p.owner}) is the cause: {p.fault}" for p in guilty),
            f"try: export {AUTOLOAD}=0, with which `import torch` works (hal's own commands do so), "
            "and repair what the plug-in misses, or uninstall it",
        ]


def examine(timeout_s: float) -> TorchState:
    """Import torch in children: alone, with all its plug-ins, and with each of them by itself.

    Args:
        timeout_s: how long each child may take.
    """
    registered = [
        (entry_point, owner)
        for plugin in entry_points.registered(TORCH_PLUGINS)
        for entry_point, owner in zip(plugin.entry_points, plugin.owners, strict=True)
    ]
    if util.find_spec("torch") is None:
        return TorchState(False, None, None, None, ())
    tasks: list[Callable[[], Ending]] = [
        lambda: run_python(_IMPORT, environment={**os.environ, AUTOLOAD: "0"}, timeout_s=timeout_s),
        lambda: run_python(_IMPORT, environment={**os.environ, AUTOLOAD: "1"}, timeout_s=timeout_s),
    ]
    if not registered and not entry_points.unreadable(TORCH_PLUGINS):
        tasks.pop()  # there is nothing that autoload would load, or stumble over while it looks
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        alone, *together = pool.map(lambda task: task(), tasks)
        fault, autoload_fault = _fault(alone), (_fault(together[0]) if together else None)
        each: list[str | None] = [None] * len(registered)
        if fault is None and autoload_fault is not None:
            each = list(pool.map(lambda pair: _load_one(pair[0].name, pair[0].value, timeout_s), registered))
    found = tuple(AutoloadPlugin(e.name, e.value, owner, why) for (e, owner), why in zip(registered, each, strict=True))
    return TorchState(True, _version(alone), fault, autoload_fault, found)


def _load_one(name: str, value: str, timeout_s: float) -> str | None:
    environment = {**os.environ, AUTOLOAD: "0"}
    return _fault(run_python(_LOAD_ONE, name, value, environment=environment, timeout_s=timeout_s))


def _fault(ending: Ending) -> str | None:
    if ending.fault is None:
        return None
    said = ending.last_line()
    if said and ending.fault.startswith("ended with"):
        return said
    return f"the process {ending.fault}" + (f" ({said})" if said else "")


def _version(ending: Ending) -> str | None:
    for line in ending.output.splitlines():
        if line.startswith("hal-torch "):
            return str(json.loads(line.removeprefix("hal-torch ")))
    return None
