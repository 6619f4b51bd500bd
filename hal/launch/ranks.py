# SPDX-License-Identifier: Apache-2.0
"""`hal run --nproc`: processes of one run, on one host or several, started and watched by torchrun's own engine."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hal.launch.settings import Settings

OPTIONS = (
    "nnodes", "node-rank", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "max-restarts",
    "monitor-interval", "start-method", "role", "log-dir", "redirects", "tee", "local-ranks-filter",
    "logs-specs", "master-addr", "master-port", "local-addr", "numa-binding", "event-log-handler",
)  # fmt: skip
"""Options of torchrun that take a value and are passed through as they are."""


def launch(settings: Settings, nproc: int, options: Sequence[str], command: Sequence[str]) -> int:
    """Run a command `nproc` times on this host, and write the report.

    Args:
        settings: of the run.
        nproc: processes on this host.
        options: of torchrun.
        command: `-m module` or a script, and arguments.

    Returns:
        The exit status: that of the first process that failed, as torchrun has it.
    """
    settings.into(os.environ, first=None)
    # Only here: a run of one process needs none of it before its program starts.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    from hal.launch import report

    # A fixed port would be taken when two runs share a host.
    alone = [] if any(option.split("=")[0].startswith(("--rdzv", "--master", "--nnodes")) for option in options) else [
        "--standalone"
    ]  # fmt: skip
    arguments = get_args_parser().parse_args([*alone, f"--nproc-per-node={nproc}", *options, *command])
    try:
        run(arguments)
        return 0
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        # A process that a signal ended: what a shell says of it.
        return code if code > 0 else 128 - code
    finally:
        report.finish(settings)
