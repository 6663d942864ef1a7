# SPDX-License-Identifier: Apache-2.0
"""The commands of `weights`."""

from __future__ import annotations

import inspect as python_inspect
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weights_core import checkpoint as files
from weights_core import config as settings
from weights_core import hookspecs
from weights_core.api import explain as make_plan
from weights_core.api import load as load_weights
from weights_core.cli.app import EPILOG, FAULT, PLUGIN, guarded, without_collecting
from weights_core.cli.extra import Commands
from weights_core.discovery import BUILT_IN
from weights_core.errors import CleanupError
from weights_core.host import PluginHost
from weights_core.report import render_decision
from weights_core.trace import VARIABLE as TRACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weights_core.inspection import Inspection
    from weights_core.types import Part

_checkpoint = click.argument("checkpoint", type=click.Path(path_type=Path))
_component = click.option("--component", help="One component of a pipeline, e.g. transformer or vae.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
_config = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="A TOML file of settings, one table per plugin; over the one WEIGHTS_CONFIG names.",
)
_format = click.option(
    "--format",
    "-f",
    "formats",
    default="auto",
    show_default=True,
    help="A plugin's name, or several in the order they are asked, separated by commas.",
)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="weights-core")
def main() -> None:
    """Load model weights, look into checkpoints, and see who would load them and why.

    A CHECKPOINT is a folder, a weights file, or an index.
    """


@main.command()
@_checkpoint
@_format
@_component
@_config
@_json
@click.option("--verify", is_flag=True, help="Compare every byte with an independent read of the files.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the load as .png, .svg or .pdf.")
@click.option("--rank", type=click.IntRange(0), help="Of what was cut for several ranks, this one's part.")
@guarded
def load(
    checkpoint: Path,
    formats: str,
    component: str | None,
    rank: int | None,
    config_file: Path | None,
    as_json: bool,
    verify: bool,
    chart: Path | None,
) -> None:
    """Read every byte of CHECKPOINT as an engine would, and report speed and memory.

    Without --component, all components of a pipeline are read, one after the other; without --rank,
    every rank's part of a checkpoint that was cut.

    \b
    Examples:
      weights load models/llama --verify
      weights load models/llama-tp4 --rank 2 --verify
      weights load models/llama -f parallel_shards --json | jq '.[0].phases'
      weights load models/flux --component transformer --chart load.png
    """
    from weights_core import chart as charts
    from weights_core.scan import ScanEngine

    host = PluginHost.discover(_read(config_file))
    parts = [
        (name, part)
        for name in _components(checkpoint, component)
        for part in _parts(host, checkpoint, name, formats, rank)
    ]
    pictures = [_picture(chart, name, part, alone=len(parts) == 1) for name, part in parts]
    for path in filter(None, pictures):
        charts.check_can_draw(path)
    printed = []
    for (name, part), picture in zip(parts, pictures, strict=True):
        if part is None:
            engine = ScanEngine(name, verify=verify, files=files.find(checkpoint, name).files)
        else:
            engine = ScanEngine(part=part.engine, verify=verify)
            if part.name and not as_json:
                click.echo(part.name)
        try:
            report = load_weights(engine, checkpoint, formats, _read(config_file))
        except CleanupError as exc:
            if exc.report is not None and not as_json:
                click.echo(exc.report)
            raise
        report.lease.close()
        if picture is not None:
            charts.draw(report, picture)
        verified = {"verified_bytes": engine.verified} if verify else {}
        printed.append(report.as_dict() | verified)
        if not as_json:
            click.echo(report)
            if verify:
                click.echo(
                    f"verified: {engine.verified:,} bytes equal an independent read, whose memory is counted"
                )
    if as_json:
        click.echo(json.dumps(printed, indent=2))


@main.command()
@_checkpoint
@_format
@_component
@_config
@guarded
def explain(checkpoint: Path, formats: str, component: str | None, config_file: Path | None) -> None:
    """Show who would load CHECKPOINT, in which order, with which settings, and why.

    Reads the headers of the files and no tensor. Settings say where they come from: a plugin's
    default, the file that WEIGHTS_CONFIG names, or --config, the later over the earlier.

    \b
    Examples:
      weights explain models/llama
      WEIGHTS_BLOCK=parallel_shards weights explain models/llama
    """
    from weights_core.scan import ScanEngine

    faults: list[str] = []
    host = PluginHost.discover(_read(config_file))
    for name in _components(checkpoint, component):
        found = _looked(host, checkpoint, name)
        part = found[0].part
        engine = ScanEngine(name, part=part.engine if part else None)
        plan = make_plan(engine, checkpoint, formats, _read(config_file))
        for one in found:
            click.echo(one.headline)
        for line in dict.fromkeys(line for one in found for line in one.remarks):
            click.echo(line)
        click.echo(f"owner: {plan.owner or 'none'}")
        click.echo(f"sources, in order: {', '.join(plan.sources) or 'none'}")
        click.echo(f"wrappers, from the outside in: {', '.join(plan.wrappers) or 'none'}")
        click.echo(f"publishers: {', '.join(plan.publishers) or 'none'}")
        for d in plan.decisions:
            click.echo(render_decision(d.plugin, d.distribution, d.roles, d.reason))
        faults += [fault for one in found for fault in one.faults]
    for line in _settings_lines(config_file):
        click.echo(line)
    if faults:
        raise click.exceptions.Exit(FAULT)


@main.command()
@_checkpoint
@_component
@_json
@guarded
def inspect(checkpoint: Path, component: str | None, as_json: bool) -> None:
    """Show the tensors of CHECKPOINT by layer, dtype and file, its ties, and all that is wrong with it.

    Of a checkpoint that was cut for several ranks, each rank's part. Reads the headers of the files and
    no tensor. Exits with 1 if there is a fault.

    \b
    Examples:
      weights inspect models/llama
      weights inspect models/llama --json | jq '.[0].tensors | length'
    """
    host = PluginHost.discover()
    with without_collecting():
        found = [
            one for name in _components(checkpoint, component) for one in _looked(host, checkpoint, name)
        ]
        if as_json:
            click.echo(json.dumps([one.as_dict() for one in found]))
        else:
            for one in found:
                click.echo(one)
    if any(one.faults for one in found):
        raise click.exceptions.Exit(FAULT)


@main.command()
@_json
@guarded
def plugins(as_json: bool) -> None:
    """List the installed plugins: what each can do, and whether it can be used.

    \b
    Example:
      weights plugins --json | jq -r '.[] | select(.active | not) | .name'
    """
    known = PluginHost.discover().overview()
    if as_json:
        click.echo(json.dumps([one.as_dict() for one in known], indent=2))
        return
    for one in known:
        state = "ok" if one.why_not is None else one.why_not
        built_in = " (built in)" if one.name == BUILT_IN else ""
        click.echo(f"{one.name:<18}{one.origin:<34}{'+'.join(one.roles):<20}{state}{built_in}")


@main.command()
@click.argument("name", required=False)
@guarded
def hooks(name: str | None) -> None:
    """Show the hooks that a plugin may implement; with NAME, one of them in full.

    \b
    Example:
      weights hooks load_weights
    """
    if name is not None and name not in hookspecs.HOOKS:
        near = settings.did_you_mean(name, hookspecs.HOOKS)
        raise click.BadParameter(f"{name!r} is no hook{near}; they are {', '.join(hookspecs.HOOKS)}")
    for hook in (name,) if name else hookspecs.HOOKS:
        specification = getattr(hookspecs, hook)
        parameters = ", ".join(python_inspect.signature(specification).parameters)
        text = python_inspect.getdoc(specification) or ""
        click.echo(f"{hook}({parameters})")
        for line in text.splitlines() if name else text.splitlines()[:1]:
            click.echo(f"    {line}".rstrip())


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True), default=".")
@_config
@_json
@guarded
def doctor(path: Path, config_file: Path | None, as_json: bool) -> None:
    """Look for what would go wrong in a load of PATH: plugins, versions, and what the machine offers.

    Exits with 1 if there is a problem.

    \b
    Example:
      weights doctor /models/llama
    """
    from weights_core.doctor import examine

    found = examine(path, _read(config_file), os.environ)
    if as_json:
        click.echo(json.dumps([one.as_dict() for one in found], indent=2))
    else:
        for one in found:
            click.echo(one)
    if any(one.verdict == "problem" for one in found):
        raise click.exceptions.Exit(FAULT)


@main.command()
@click.argument("name")
@click.option(
    "--contract", metavar="MODULE:CLASS", help="The contract class that its author tests the plugin with."
)
@_config
@_json
@guarded
def check(name: str, contract: str | None, config_file: Path | None, as_json: bool) -> None:
    """Try the installed plugin NAME on its contract, clause by clause.

    Without --contract it is tried on what its distribution brings for that, else on safetensors
    checkpoints, in each role that it takes. Exits with
    3 if a clause is broken, with 1 if the given contract could not be tried.

    \b
    Examples:
      weights check parallel_shards
      weights check hello --contract tests.test_contract:TestHello
    """
    from weights_core.cli.checking import tried

    results: Counter[str] = Counter()
    printed = []
    for heading, verdicts in tried(name, contract, settings.merged(_read(config_file)).get(name, {})):
        if not as_json:
            click.echo(heading)
        for verdict in verdicts:
            results[verdict.result] += 1
            printed.append(verdict.as_dict() | {"contract": heading})
            if not as_json:
                click.echo(verdict)
    if as_json:
        click.echo(json.dumps(printed, indent=2))
    else:
        click.echo(
            f"{len(printed)} clauses: "
            + ", ".join(f"{n} {what.replace('holds', 'hold')}" for what, n in results.items())
        )
    if results["broken"]:
        raise click.exceptions.Exit(PLUGIN)
    if contract is not None and results["not tried"]:
        raise click.exceptions.Exit(FAULT)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Append to this file, not to standard error."
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@guarded
def trace(output: Path | None, command: tuple[str, ...]) -> None:
    """Run COMMAND and show every hook call: plugin, arguments, result and time.

    Sets WEIGHTS_TRACE, which any program that loads weights honours: 1 for standard error, or a file.

    \b
    Examples:
      weights trace -- weights load models/llama
      weights trace -o calls.log -- python serve.py
    """
    environ = os.environ | {TRACE: "1" if output is None else str(output.absolute())}
    try:
        os.execvpe(command[0], command, environ)
    except OSError as exc:
        raise click.BadParameter(f"{command[0]}: {exc.strerror}", param_hint="COMMAND") from exc


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@guarded
def completion(shell: str) -> None:
    """Print the script that completes `weights` in a shell.

    \b
    Example:
      weights completion bash > ~/.local/share/bash-completion/completions/weights
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None
    click.echo(maker(main, {}, "weights", "_WEIGHTS_COMPLETE").source())


def _components(checkpoint: Path, component: str | None) -> Sequence[str | None]:
    return (component,) if component else files.components(checkpoint) or (None,)


def _parts(
    host: PluginHost, checkpoint: Path, component: str | None, formats: str, rank: int | None
) -> Sequence[Part | None]:
    """Return the parts to load of what was cut; None stands for what is whole."""
    from weights_core.parts import parts_of

    parts = parts_of(host, checkpoint, component, formats)
    if rank is None:
        return parts or (None,)
    if not parts:
        files.find(checkpoint, component)  # or there is nothing at all
        raise click.BadParameter(f"{checkpoint} is not cut for ranks", param_hint="--rank")
    chosen = [part for part in parts if part.rank == rank]
    if not chosen:
        raise click.BadParameter(
            f"{checkpoint} was cut for ranks 0 to {len(parts) - 1}, not for {rank}", param_hint="--rank"
        )
    return chosen


def _looked(host: PluginHost, checkpoint: Path, component: str | None) -> Sequence[Inspection]:
    """Inspect a checkpoint, or each part of what was cut."""
    from weights_core.inspection import inspect as look
    from weights_core.parts import inspect_part, parts_of

    parts = parts_of(host, checkpoint, component)
    return [inspect_part(host, checkpoint, part) for part in parts] or [look(checkpoint, component)]


def _read(config_file: Path | None) -> dict[str, Any] | None:
    return settings.read_toml(config_file, "--config") if config_file is not None else None


def _picture(chart: Path | None, component: str | None, part: Part | None, *, alone: bool) -> Path | None:
    rank = f"rank-{part.rank}" if part and part.name else None
    label = "-".join(filter(None, (component, rank)))
    return chart.with_stem(f"{chart.stem}-{label}") if chart is not None and label and not alone else chart


def _settings_lines(config_file: Path | None) -> list[str]:
    """Say each plugin's settings, and where each comes from."""
    layers = settings.layers(_read(config_file), os.environ, argument_name=f"--config {config_file}")
    host = PluginHost.discover(_read(config_file))
    lines = []
    for one in host.overview():
        parts = []
        for name, value in one.settings.items():
            origins = [origin for origin, layer in layers if name in layer.get(one.name, {})]
            parts.append(f"{name} = {value!r} ({origins[-1] if origins else 'default'})")
        if parts:
            lines.append(f"settings of {one.name}: {', '.join(parts)}")
    return lines
