# SPDX-License-Identifier: Apache-2.0
"""Python runs this in every process of `hal run` before the program, since its folder is first on PYTHONPATH.

In the run's first process the device is opened at once, so that a missing one is said before the program starts. In
others (workers of a data loader, ranks, whatever Python program is called) nothing happens until one imports torch.
The user's own sitecustomize, which this one hides, runs afterwards.
"""

import builtins
import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  pathlib would cost every process its import
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") != _HERE]  # noqa: PTH100


def _start_with_torch() -> None:
    original, started = builtins.__import__, False

    def __import__(name, globals=None, locals=None, fromlist=(), level=0):  # type: ignore[no-untyped-def]  # noqa: N807
        nonlocal started
        before = started
        module = original(name, globals, locals, fromlist, level)
        if before:  # whoever wrapped this function still calls it
            return module
        if not started:  # nor did an import inside of this one bring torch
            torch = sys.modules.get("torch")
            if torch is None or getattr(torch.__spec__, "_initializing", False):
                return module
            started = True
            if builtins.__import__ is __import__:
                builtins.__import__ = original
            from hal.launch.process import start

            start()
        # Once more, now through what was put in place: the importer gets what a redirected program sees.
        return builtins.__import__(name, globals, locals, fromlist, level)

    builtins.__import__ = __import__


if "HAL_RUN" in os.environ:
    if os.environ.get("HAL_RUN_LAUNCHER") == str(os.getppid()):
        from hal.launch.ranks import end_with_launcher

        end_with_launcher()
    if os.environ.get("HAL_RUN_FIRST") == str(os.getpid()):
        from hal.launch.process import start_first

        start_first()
    else:
        _start_with_torch()

_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
if _hidden is not None and _hidden.loader is not None:
    sys.modules["sitecustomize"] = importlib.util.module_from_spec(_hidden)
    _hidden.loader.exec_module(sys.modules["sitecustomize"])
