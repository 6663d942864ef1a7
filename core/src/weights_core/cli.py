# SPDX-License-Identifier: Apache-2.0
"""The `weights` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import click

from weights_core import checkpoint as files
from weights_core.api import load as load_weights
from weights_core.api import open_session
from weights_core.discovery import BUILT_IN
from weights_core.errors import WeightsError
from weights_core.host import PluginHost
from weights_core.report import render_decision

P = ParamSpec("P")

_format = click.option(
    "--format",
    "-f",
    "formats",
    default="auto",
    show_default=True,
    help="A plugin's name, or several in the order they are asked, separated by commas.",
)
_component = click.option("--component", help="One component of a pipeline, e.g. transformer or vae.")
_checkpoint = click.argument("checkpoint", type=click.Path(path_type=Path))


def _plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Show a user's mistake as one line, without a traceback, and exit with 1."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except WeightsError as exc:
            click.echo(f"weights: {type(exc).__name__}: {exc}", err=True)
            sys.exit(1)

    return run


@click.group()
@click.version_option(package_name="weights-core")
def main() -> None:
    """Load model weights, and see which plugin would load them and why."""


@main.command()
@_checkpoint
@_format
@_component
@click.option("--verify", is_flag=True, help="Compare every byte with an independent read of the files.")
@_plain_errors
def load(checkpoint: Path, formats: str, component: str | None, verify: bool) -> None:
    """Read every byte of CHECKPOINT as an engine would, and report speed and memory.

    Without --component, all components of a pipeline are read, one after the other.
    """
    from weights_core.scan import ScanEngine

    for name in _components(checkpoint, component):
        engine = ScanEngine(name, verify=verify, files=files.find(checkpoint, name).files)
        report = load_weights(engine, checkpoint, _split(formats))
        click.echo(report)
        if verify:
            click.echo(f"verified: {engine.verified:,} bytes equal an independent read of the files")
        report.lease.close()


@main.command()
@_checkpoint
@_format
@_component
@_plain_errors
def explain(checkpoint: Path, formats: str, component: str | None) -> None:
    """Show who would load CHECKPOINT, in which order, and why; reads no tensor."""
    from weights_core.scan import ScanEngine

    for name in _components(checkpoint, component):
        found = files.find(checkpoint, name)
        with open_session(ScanEngine(name), checkpoint, _split(formats)) as session:
            plan = session.resolve()
        title = f"{found.root}: {len(found.files)} {found.kind} file{'s' * (len(found.files) != 1)}"
        click.echo(title + (f", index {found.index.name}" if found.index else ""))
        for note in found.notes:
            click.echo(f"note: {note}")
        click.echo(f"owner: {plan.owner or 'none'}")
        click.echo(f"sources, in order: {', '.join(plan.sources) or 'none'}")
        click.echo(f"wrappers, from the outside in: {', '.join(plan.wrappers) or 'none'}")
        click.echo(f"publishers: {', '.join(plan.publishers) or 'none'}")
        for decision in plan.decisions:
            click.echo(
                render_decision(decision.plugin, decision.distribution, decision.roles, decision.reason)
            )


@main.command()
@_plain_errors
def plugins() -> None:
    """List the installed plugins, and whether each can be used."""
    for plugin, problem in PluginHost.discover().check():
        built_in = " (built in)" if plugin.name == BUILT_IN else ""
        click.echo(f"{plugin.name:<18}{plugin.origin:<34}{problem or 'ok'}{built_in}")


def _split(formats: str) -> list[str]:
    return [name.strip() for name in formats.split(",") if name.strip()] or ["auto"]


def _components(checkpoint: Path, component: str | None) -> tuple[str | None, ...]:
    return (component,) if component else files.components(checkpoint) or (None,)
