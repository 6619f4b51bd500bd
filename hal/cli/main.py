# SPDX-License-Identifier: Apache-2.0
"""The `hal` command: finds the commands, turns errors into messages and exit statuses.

Exit status: 0, or what the command defines; 2 for wrong usage or an unreadable setting; 3 for a device or plug-in
that is unknown, absent or broken; 1 for another refusal; 70 for a fault of hal itself. Results go to stdout,
messages to stderr.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from dataclasses import dataclass
from typing import IO, Any

import click

import hal
from hal.autoload import AUTOLOAD
from hal.cli.commands import CommandGroup
from hal.cli.output import plain, say
from hal.errors import HalError
from hal.exit_status import INTERNAL, READER_GONE, USAGE, exit_status


@dataclass
class Invocation:
    """What commands want to know of the call; the object of click's context.

    Attributes:
        debug: show tracebacks.
        autoload: TORCH_DEVICE_BACKEND_AUTOLOAD as the user has it, before it is turned off here.
    """

    debug: bool
    autoload: str | None


class Failure(click.ClickException):
    """An error as the user sees it: on stderr, without a traceback."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_code = status  # type: ignore[misc]  # click documents it as an attribute

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the message to stderr."""
        say(f"hal: {plain(self.message, indent=0)}")


class Main(CommandGroup):
    """The top-level group: the one place where errors are caught."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; wrong usage is status 2 where its message cannot be told, too."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # of click's own message: all others are caught below
            if error.errno != errno.ENOSPC:
                raise
            sys.exit(USAGE)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                _flush()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # `| head`: whoever reads has enough, which says nothing about what was asked
            _drop_stdout()
            raise click.exceptions.Exit(READER_GONE) from None
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename is not None:
                raise self._fault(ctx, error) from error
            _drop_stdout()
            raise Failure(f"an output: {error.strerror}", USAGE) from error
        except HalError as error:
            _show(ctx)
            raise Failure(str(error), exit_status(error)) from error
        except Exception as error:
            raise self._fault(ctx, error) from error

    @staticmethod
    def _fault(ctx: click.Context, error: Exception) -> Failure:
        _show(ctx)
        return Failure(
            f"a fault in hal or one of its plug-ins: {type(error).__name__}: {error}\n"
            "  try: the same with `hal --debug ...`, which shows where",
            INTERNAL,
        )


def _flush() -> None:
    """Write what is left now, where an error can still be told."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _drop_stdout() -> None:
    """Let what cannot be written go nowhere: Python would try once more as it ends, and complain."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _show(ctx: click.Context) -> None:
    """Show the traceback of the error in hand, if the user wants to see tracebacks."""
    if isinstance(ctx.obj, Invocation) and ctx.obj.debug:
        import traceback  # only now: `hal run` must start quickly

        traceback.print_exc()


def _restore_autoload(value: str | None) -> None:
    if value is None:
        os.environ.pop(AUTOLOAD, None)
    else:
        os.environ[AUTOLOAD] = value


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(hal.__version__, prog_name="hal")
@click.option("--debug", is_flag=True, envvar="HAL_DEBUG", help="Show tracebacks. [env: HAL_DEBUG]")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Train Mixture-of-Experts models on any accelerator, and prove that the numbers agree."""
    before = os.environ.get(AUTOLOAD)
    ctx.obj = Invocation(debug=debug, autoload=before)
    # One broken plug-in in torch's own group makes `import torch` fail; hal loads the vendor's package itself.
    os.environ[AUTOLOAD] = "0"
    ctx.call_on_close(lambda: _restore_autoload(before))


if __name__ == "__main__":
    sys.exit(main())
