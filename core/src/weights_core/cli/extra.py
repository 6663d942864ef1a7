# SPDX-License-Identifier: Apache-2.0
"""Commands that other distributions bring, by entry points in the group `weights.commands`."""

from __future__ import annotations

import click

from weights_core.cli.app import PLUGIN
from weights_core.discovery import COMMANDS, Installed, conflicts, installed


class BrokenCommand(click.ClickException):
    """A distribution's command cannot be used; names both."""

    exit_code = PLUGIN


class Commands(click.Group):
    """A group that also has installed commands; one of them is imported when it is invoked.

    A command of the group's own hides an installed one of the same name.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the group's own commands, then the installed ones, without importing any."""
        return [*super().list_commands(ctx), *self._others()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, importing it if it is an installed one.

        Raises:
            BrokenCommand: it cannot be imported, is no command, or two distributions bring it.
        """
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = self._others().get(cmd_name)
        return _imported(cmd_name, found) if found else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands; of an installed one, who brings it."""
        others = self._others()
        width = formatter.width - 6 - max(map(len, (*self.commands, *others)), default=0)
        rows = [(name, command.get_short_help_str(width)) for name, command in sorted(self.commands.items())]
        rows += [(name, f"Of {found[0].distribution}.") for name, found in others.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _others(self) -> dict[str, list[Installed]]:
        others: dict[str, list[Installed]] = {}
        for one in installed(COMMANDS):
            if one.name not in self.commands:
                others.setdefault(one.name, []).append(one)
        return others


def _imported(name: str, found: list[Installed]) -> click.Command:
    for first, second, *_ in conflicts(found).values():
        raise BrokenCommand(
            f"{first.origin} and {second.origin} both bring a command {name!r}: uninstall one"
        )
    (one,) = found
    try:
        command = one.load()
    except Exception as exc:  # importing a third party's module may raise anything
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())}"
        raise BrokenCommand(f"command {name!r} of {one.origin} cannot be imported: {why}") from exc
    if not isinstance(command, click.Command):
        raise BrokenCommand(f"command {name!r} of {one.origin} is no click command: {command!r}")
    return command
