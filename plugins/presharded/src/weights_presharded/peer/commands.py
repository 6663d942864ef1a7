# SPDX-License-Identifier: Apache-2.0
"""The command `weights peers`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import click

from weights_core import config as core_config
from weights_core.cli.app import guarded
from weights_presharded.peer.places import open_registry

if TYPE_CHECKING:
    from weights_presharded.peer.entry import Entry


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--registry", help="A folder or redis://…; by default that of WEIGHTS_CONFIG, else the user's own."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@guarded
def peers(registry: str | None, as_json: bool) -> None:
    """List the engines that serve their weights: of what, how much, since when, to how many.

    \b
    Example:
      weights peers --json | jq '.sources[] | select(.stale | not) | .identity.digest'
    """
    from weights_presharded.plugin import NAME, PreshardedConfig

    given = core_config.merged(None).get(NAME, {})
    settings = core_config.structure(NAME, PreshardedConfig, given)
    if registry is not None:
        settings = attrs.evolve(settings, registry=registry)
    opened = open_registry(settings, os.environ)
    try:
        found = sorted(opened.entries(), key=lambda entry: (entry.identity.digest, entry.started))
    finally:
        opened.close()
    if as_json:
        told = {"schema": "weights.peers/1", "registry": opened.name, "sources": [_plain(e) for e in found]}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(_table(opened.name, found))


def _plain(entry: Entry) -> dict[str, Any]:
    return entry.as_dict() | {"stale": entry.is_stale}


def _table(name: str, found: Sequence[Entry]) -> str:
    if not found:
        return f"no source is in {name}"
    lines = [f"{len(found)} source{'s' * (len(found) != 1)} in {name}"]
    for entry in found:
        identity = entry.identity
        state = (
            f"stale, silent for {_age(entry.age)}"
            if entry.is_stale
            else f"{entry.active} of {entry.limit} served"
        )
        lines.append(
            f"{entry.id[:8]}  {entry.name}, {entry.device}: {identity.layout.value}, "
            f"{entry.nbytes / 1e6:,.1f} MB, {entry.tensors} tensors, {state}, {entry.served} before"
        )
        ranks = sorted(identity.axes.items())
        axes = ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in ranks)
        of = [identity.engine, identity.engine_version, identity.model, identity.dtype, identity.quantization]
        of += [identity.component, identity.role if identity.role != "main" else None, axes]
        lines.append(f"          {', '.join(str(part) for part in of if part)}")
        lines.append(f"          {identity.digest}")
    return "\n".join(lines)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
