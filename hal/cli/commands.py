# SPDX-License-Identifier: Apache-2.0
"""Commands come from the entry-point group `hal.commands`, from this package and from others in the same way.

A command's module is imported when the command is called or listed, so it should import nothing heavy at its top.
One that cannot be imported is listed as broken with the reason, and costs only itself.
"""

from __future__ import annotations

from typing import Any

import click

from hal import entry_points
from hal.cli.output import plain, stdout_for_results
from hal.entry_points import Plugin
from hal.errors import HalError, PluginError, described

COMMANDS = "hal.commands"


class BrokenCommand(click.Command):
    """Stands for a command that cannot be loaded: it is listed, and calling it says why it does not work."""

    def __init__(self, name: str, error: HalError) -> None:
        super().__init__(
            name,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            add_help_option=False,
            short_help=f"(broken) {plain(error.message)}",
        )
        self.error = error

    def invoke(self, ctx: click.Context) -> Any:
        """Raise what is wrong."""
        raise self.error


def load(plugin: Plugin) -> click.Command:
    """Return a command, or a `BrokenCommand` in its place. Never raises."""
    if len(plugin.entry_points) > 1:
        return BrokenCommand(
            plugin.name,
            PluginError(
                f"command {plugin.name!r} is registered by {plugin.claimants()}",
                hint="uninstall one of them; neither is used while both are there",
            ),
        )
    entry_point, owner = plugin.entry_points[0], plugin.owners[0]
    try:
        with stdout_for_results():
            command = entry_point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  one bad plug-in must not end the others
        broken = PluginError(f"importing {entry_point.value} of {owner} raised {described(error)}")
        broken.__cause__ = error
        return BrokenCommand(plugin.name, broken)
    if not isinstance(command, click.Command):
        return BrokenCommand(
            plugin.name,
            PluginError(
                f"{entry_point.value} of {owner} is a {type(command).__name__}", expected="a click command or group"
            ),
        )
    return command


class CommandGroup(click.Group):
    """A group whose members are looked up among the installed plug-ins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group.list_commands`."""
        return sorted({*super().list_commands(ctx), *(plugin.name for plugin in entry_points.registered(COMMANDS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See `click.Group.get_command`."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        return next((load(plugin) for plugin in entry_points.registered(COMMANDS) if plugin.name == cmd_name), None)
