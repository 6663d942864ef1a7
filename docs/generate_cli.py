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
    parts += _block(root, weights)
    for name in weights.list_commands(root):
        command = weights.get_command(root, name)
        assert command is not None
        parts += [f"## weights {name}", ""]
        parts += _block(click.Context(command, info_name=name, parent=root, terminal_width=100), command)
    return "\n".join(parts)


def _block(context: click.Context, command: click.Command) -> list[str]:
    return ["```text", command.get_help(context), "```", ""]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
