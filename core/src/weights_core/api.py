# SPDX-License-Identifier: Apache-2.0
"""The one-call way to load, for one engine or for the components of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs

from weights_core.checkpoint import components
from weights_core.config import Settings
from weights_core.engine import Engine
from weights_core.errors import (
    CheckpointError,
    CleanupError,
    EngineError,
    FormatUnresolvedError,
    PluginConfigError,
)
from weights_core.host import PluginHost
from weights_core.planning import make_plan
from weights_core.progress import Show
from weights_core.report import LoadReport
from weights_core.session import Session
from weights_core.types import EngineInfo, Layout, LoadRequest, Plan

Format = str | Sequence[str]


def open_session(
    engine: Engine,
    checkpoint: Path | str,
    format: Format = "auto",
    config: Settings | None = None,
    *,
    host: PluginHost | None = None,
    unused: Literal["report", "refuse"] = "report",
    progress: Show = "rank 0",
    timeout: float = 600.0,
) -> Session:
    """Return a session for one load, for engines that drive the steps themselves.

    Args:
        engine: what to load into.
        checkpoint: a folder, a weights file, or an index; `engine.checkpoint` overrides it.
        format: `"auto"`, a plugin's name, or several in the order they are to be asked.
        config: plugin name → setting → value; over what `WEIGHTS_CONFIG` says.
        host: the plugins to choose from; by default all that are installed.
        unused: what to do with tensors of the checkpoint that the engine did not take.
        progress: which ranks show a bar on standard error, where that is a terminal.
        timeout: seconds that a rank waits for the others.

    Raises:
        EngineError: `engine` is none.
        PluginError: the settings or the installed plugins are in conflict, or `config` is given
            beside a `host`, which has its own.
    """
    chosen, request = _prepared(engine, checkpoint, format, config, host)
    request = attrs.evolve(request, unused=unused, timeout=timeout)
    return chosen.session(request, engine, progress=progress)


def explain(
    engine: Engine,
    checkpoint: Path | str,
    format: Format = "auto",
    config: Settings | None = None,
    *,
    host: PluginHost | None = None,
) -> Plan:
    """Return who would do what in a load, and why, without beginning it.

    Arguments are those of `open_session`.

    Raises:
        PluginError: a plugin that was asked for is missing or broken.
        FormatError: the format cannot be served.
    """
    chosen, request = _prepared(engine, checkpoint, format, config, host)
    return make_plan(chosen.hooks(request), request)


def _prepared(
    engine: Engine,
    checkpoint: Path | str,
    format: Format,
    config: Settings | None,
    host: PluginHost | None,
) -> tuple[PluginHost, LoadRequest]:
    if isinstance(engine, type):
        raise EngineError(f"{engine.__name__} is a class: give an engine, one object for each load")
    if not isinstance(getattr(engine, "info", None), EngineInfo):
        raise EngineError(
            f"a {type(engine).__name__} is no engine: wrap a torch module in TorchEngine, or subclass Engine"
        )
    names: object = [format] if isinstance(format, str) else format
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise FormatUnresolvedError(f"format is 'auto', a plugin's name, or several; got {format!r}")
    if host is not None and config is not None:
        raise PluginConfigError("config is the host's: give it to PluginHost, or leave out host")
    request = LoadRequest(checkpoint=engine.checkpoint or checkpoint, engine=engine.info, format=format)
    return host or PluginHost.discover(config), request


def load(
    engine: Engine,
    checkpoint: Path | str,
    format: Format = "auto",
    config: Settings | None = None,
    *,
    host: PluginHost | None = None,
    unused: Literal["report", "refuse"] = "report",
    progress: Show = "rank 0",
    timeout: float = 600.0,
) -> LoadReport:
    """Load a checkpoint into an engine: every step of a session, post-load and publishing included.

    Arguments are those of `open_session`.

    Raises:
        WeightsError: the load failed; the engine is untouched, re-initialised, or the error's
            notes say that it must not be used.

    Example:
        >>> report = load(TorchEngine(model), "path/to/checkpoint")
        >>> print(report)
    """
    opened = open_session(
        engine, checkpoint, format, config, host=host, unused=unused, progress=progress, timeout=timeout
    )
    with opened as session:
        session.resolve()
        session.load()
        session.apply()
        session.publish(Layout.SHARDED)
        session.post_load()
        session.publish(Layout.FINAL)
        return session.finish()


def load_pipeline(
    engines: Mapping[str, Engine],
    checkpoint: Path | str,
    format: Format = "auto",
    config: Settings | None = None,
    *,
    host: PluginHost | None = None,
    progress: Show = "rank 0",
    timeout: float = 600.0,
) -> dict[str, LoadReport]:
    """Load the components of a pipeline one after the other, each into its own engine.

    All components are checked to exist before the first is loaded. If one fails, the leases of
    those before it are closed and its error is raised.

    Args:
        engines: component name → engine whose `info.component` is that name.
        checkpoint: a folder with a `model_index.json` and a folder per component.
        format: as `open_session`.
        config: as `open_session`.
        host: as `open_session`.
        progress: as `open_session`.
        timeout: as `open_session`.

    Raises:
        CheckpointError: a component is not in the pipeline.
        ValueError: an engine is for another component than the one it is given for.
    """
    have = components(Path(checkpoint))
    for name, engine in engines.items():
        if engine.info.component != name:
            raise ValueError(f"the engine for {name!r} says its component is {engine.info.component!r}")
        if name not in have:
            raise CheckpointError(
                f"has no component {name!r}; it has {', '.join(have) or 'none (no model_index.json)'}",
                file=Path(checkpoint),
            )
    reports: dict[str, LoadReport] = {}
    try:
        for name, engine in engines.items():
            reports[name] = load(
                engine, checkpoint, format, config, host=host, progress=progress, timeout=timeout
            )
    except BaseException as exc:
        loaded = [*reports.values(), exc.report if isinstance(exc, CleanupError) else None]
        for report in filter(None, loaded):
            try:
                report.lease.close()
            except CleanupError as failure:
                exc.add_note(str(failure))
        raise
    return reports
