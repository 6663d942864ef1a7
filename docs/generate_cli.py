# SPDX-License-Identifier: Apache-2.0
"""Write the page on the command line from the commands themselves: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from weights_core.cli import main as weights


def page() -> str:
    """Return the text of docs/cli.md."""
    parts = [
        "# The command line",
        "",
        "Written by `make docs` from the commands; a test holds it to them.",
        "",
    ]
    root = click.Context(weights, info_name="weights", terminal_width=100, **weights.context_settings)
    return "\n".join(parts + _block(root, weights) + _commands(root, weights))


def _commands(parent: click.Context, group: click.Group) -> list[str]:
    parts = []
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, terminal_width=100)
        parts += [f"## {context.command_path}", "", *_block(context, command)]
        if isinstance(command, click.Group):
            parts += _commands(context, command)
    return parts


def _block(context: click.Context, command: click.Command) -> list[str]:
    return ["```text", command.get_help(context), "```", ""]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
