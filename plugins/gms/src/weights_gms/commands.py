# SPDX-License-Identifier: Apache-2.0
"""The commands `weights gms …`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weights_core.checkpoint import find
from weights_core.cli.app import FAULT, guarded
from weights_core.digest import content_digest, write_sidecar
from weights_gms.client import Endpoint, ask_once, command, default_socket

if TYPE_CHECKING:
    from collections.abc import Mapping

_socket = click.option("--socket", "socket_path", help="The broker's socket; by default the user's own.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def gms() -> None:
    """One copy of the weights for every engine on the node: see who shares what."""


@gms.command()
@_socket
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@guarded
def status(socket_path: str | None, as_json: bool) -> None:
    """Show slots, generations, what they are of, their bytes, and who holds them.

    \b
    Example:
      weights gms status --json | jq '.slots[].generations[].leases[].pid'
    """
    endpoint = _endpoint(socket_path)
    found = ask_once(endpoint, {"op": "status"})
    if as_json:
        shown = found or {"slots": [], "waiting": [], "broker": None}
        told = {name: value for name, value in shown.items() if name not in ("v", "ok")}
        click.echo(json.dumps({"schema": "weights.gms-status/1", **told}, indent=2))
    elif found is None:
        click.echo(f"no broker at {endpoint.socket}: nothing is shared")
    else:
        click.echo(_table(found))


@gms.command()
@_socket
@click.argument("slot")
@guarded
def evict(socket_path: str | None, slot: str) -> None:
    """Hand the weights of SLOT to nobody more; who holds them keeps them. Exits with 1 if it has none.

    \b
    Example:
      weights gms evict weights/cpu/-/main/0of1
    """
    endpoint = _endpoint(socket_path)
    found = ask_once(endpoint, {"op": "evict", "slot": slot})
    if found is None or found["ok"] != "evicted":
        click.echo(f"slot {slot} has no weights at {endpoint.socket}")
        raise click.exceptions.Exit(FAULT)
    click.echo(f"evicted the weights of {slot}")


@gms.command()
@_socket
@click.option("--allow-uid", "allow", type=click.IntRange(0), multiple=True, help="Another user to serve.")
@guarded
def serve(socket_path: str | None, allow: tuple[int, ...]) -> None:
    """Run the broker in the foreground, for a service manager or a sidecar, until SIGTERM.

    Prints a line when it takes connections. Without it, engines start a broker when they need one.

    \b
    Example:
      weights gms serve --socket /run/weights/broker.sock --allow-uid 1001
    """
    line = command(_endpoint(socket_path), foreground=True, allow=allow)
    os.execv(line[0], line)


@gms.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--component", help="One component of a pipeline, e.g. transformer or vae.")
@click.option("--write", is_flag=True, help="Hash the files and write the digests beside them.")
@guarded
def digest(checkpoint: Path, component: str | None, write: bool) -> None:
    """Show the digest by which CHECKPOINT is told from others, and how it was found.

    With --write it is computed now, once, and every engine that loads these files believes it.

    \b
    Example:
      weights gms digest models/llama --write
    """
    files = find(checkpoint, component)
    if write:
        click.echo(f"wrote {write_sidecar(files)}")
    click.echo(str(content_digest(files)))


def _endpoint(socket_path: str | None) -> Endpoint:
    """Return where to look; whoever names a place trusts its owner."""
    path = os.path.abspath(socket_path or default_socket(os.environ, os.geteuid()))
    owners = {os.geteuid()}
    if socket_path and os.path.isdir(os.path.dirname(path)):
        owners.add(os.stat(os.path.dirname(path)).st_uid)
    return Endpoint(path, start=False, owners=frozenset(owners))


def _table(found: Mapping[str, Any]) -> str:
    broker = found["broker"]
    lines = [f"broker {broker['pid']} at {broker['socket']}, up {_age(found['uptime'])}"]
    for slot in found["slots"]:
        lines.append(f"{slot['slot']}")
        for g in slot["generations"]:
            state = "served" if g["serving"] else "replaced, held by its readers"
            lines.append(
                f"  generation {g['number']}: {g['bytes'] / 1e6:,.1f} MB, {state}, {len(g['leases'])} leases"
            )
            lines.append(
                "    " + ", ".join(f"{name} {value}" for name, value in g["identity"].items() if value)
            )
            lines += [f"    pid {lease['pid']}, for {_age(lease['age'])}" for lease in g["leases"]]
        if slot["writer"]:
            lines.append(f"  written by pid {slot['writer']['pid']}, for {_age(slot['writer']['age'])}")
    lines += [f"pid {w['pid']} waits for {w['for']}, for {_age(w['age'])}" for w in found["waiting"]]
    if not found["slots"] and not found["waiting"]:
        lines.append("nothing is shared")
    return "\n".join(lines)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
