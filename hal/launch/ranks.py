# SPDX-License-Identifier: Apache-2.0
"""`hal run --nproc`: processes of one run, on one host or several, started and watched by torchrun's own engine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from hal.errors import ConfigError
from hal.launch.settings import LAUNCHER, Settings

OPTIONS = (
    "nnodes", "node-rank", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "max-restarts",
    "monitor-interval", "start-method", "role", "log-dir", "redirects", "tee", "local-ranks-filter",
    "logs-specs", "master-addr", "master-port", "local-addr", "numa-binding", "event-log-handler",
)  # fmt: skip
"""Options of torchrun that take a value and are passed through as they are."""

GRACE_S = 10.0
"""How long what a failed run leaves behind may take to end after SIGTERM."""


def launch(settings: Settings, nproc: int, options: Sequence[str], command: Sequence[str]) -> int:
    """Run a command `nproc` times on this host, and write the report.

    Args:
        settings: of the run.
        nproc: processes on this host.
        options: of torchrun.
        command: `-m module` or a script, and arguments.

    Returns:
        The exit status: that of the first process that failed, as torchrun has it, or what a shell says of a signal.

    Raises:
        ConfigError: torchrun cannot read an option.
    """
    settings.into(os.environ, first=None)
    os.environ[LAUNCHER] = str(os.getpid())
    # Only here: a run of one process needs none of it before its program starts.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    from hal.launch import report

    # A fixed port would be taken when two runs share a host.
    alone = [] if any(option.split("=")[0].startswith(("--rdzv", "--master", "--nnodes")) for option in options) else [
        "--standalone"
    ]  # fmt: skip
    succeeded = False
    try:
        _adopt_orphans()
        run(get_args_parser().parse_args([*alone, f"--nproc-per-node={nproc}", *options, *command]))
        succeeded = True
        return 0
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    except ValueError as error:
        raise ConfigError(f"torchrun cannot do that: {error}") from error
    finally:
        if not succeeded:
            _end_descendants()
        report.finish(settings)


def check(device: str | None, nproc: int) -> None:
    """Refuse before any process is started what each of them would refuse, or what none of them could see.

    Raises:
        UnknownDevice, Absent, Broken, ConfigError: the last process would have no device, or the host no memory.
    """
    import psutil
    import torch  # noqa: F401  for its size

    from hal.registry import find_device

    name = os.environ.get("HAL_DEVICE") if device is None else device
    if name not in (None, "auto"):
        find_device(name, rank=nproc - 1)
    # Of each process at least what this one has for itself, which has imported torch and computes nothing.
    own, total = psutil.Process().memory_full_info().uss, psutil.virtual_memory().total
    if nproc * own > total:
        raise ConfigError(
            f"{nproc} processes need {nproc * own / 2**30:.0f} GiB before the program begins, and this host has "
            f"{total / 2**30:.0f}", expected=f"--nproc of at most {total // own}",
        )  # fmt: skip


# Processes that outlive others -------------------------------------------------------------------------------------

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def _prctl(option: int, value: int) -> None:
    """Set an attribute of this process, where there is such a call: elsewhere its processes outlive a killed one."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_with_launcher() -> None:
    """End this process, a rank, when its launcher ends: one that was killed cannot tell its ranks."""
    _prctl(_SET_PDEATHSIG, signal.SIGTERM)


def _adopt_orphans() -> None:
    """Become the parent of what a rank leaves behind when it is killed, such as workers of a data loader."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _end_descendants() -> None:
    """End what a failed run has left behind, by force after `GRACE_S`."""
    import psutil

    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=GRACE_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
