# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were cut for several ranks, as their readers describe them. Imports no torch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs

from weights_core.api import load
from weights_core.engine import Engine
from weights_core.errors import CheckpointError, IdentityMismatchError, LoadError, PluginError
from weights_core.host import PluginHost
from weights_core.inspection import Inspection
from weights_core.types import Applied, EngineInfo, FormatClaim, Layout, LoadRequest, Part, TensorMeta
from weights_core.weightset import WeightSet

log = logging.getLogger("weights")


def parts_of(
    host: PluginHost, checkpoint: Path, component: str | None = None, format: str = "auto"
) -> tuple[Part, ...]:
    """Return what a checkpoint was cut into, or () if it is whole, or nobody here can say.

    A plugin that cannot answer is passed over with a warning: it may have nothing to do with it.

    Args:
        host: the plugins; the one that fits best is believed.
        checkpoint: what may have been cut.
        component: of a pipeline.
        format: `"auto"`, or the plugins that are asked, separated by commas.

    Raises:
        PluginConfigError: the settings are wrong.
        PluginLoadError: a plugin that `format` names is broken.
    """
    info = EngineInfo(name="none", version="", component=component)
    request = LoadRequest(checkpoint=checkpoint, engine=info, format=format)
    hooks = host.hooks(request)
    asked = hooks.plugins if request.format == ("auto",) else request.format
    cut: list[FormatClaim] = []
    for name in asked:
        try:
            claim = hooks.resolve_format(name, request) if name in hooks.plugins else None
        except PluginError as exc:
            log.warning("%s", exc)
            continue
        if claim is not None and claim.parts:
            cut.append(claim)
    return max(cut, key=lambda claim: claim.fit).parts if cut else ()


def taking_anything(info: EngineInfo) -> EngineInfo:
    """Return an engine that takes what `info` would, in any layout, and shares nothing."""
    return attrs.evolve(info, accepts=tuple(Layout), shareable={}, device="cpu")


def stored_names(metas: Iterable[TensorMeta]) -> dict[str, str]:
    """Return, for each further name of the same bytes of a file, the first, which the file has."""
    first: dict[tuple[Path, int, int], str] = {}
    found = {}
    for meta in metas:
        if meta.file is not None and meta.offset is not None and meta.nbytes:
            name = first.setdefault((meta.file, meta.offset, meta.nbytes), meta.name)
            if name != meta.name:
                found[meta.name] = name
    return found


def inspect_part(host: PluginHost, checkpoint: Path, part: Part) -> Inspection:
    """Have a part be opened by who reads it, and read no tensor; what is wrong is a fault.

    Raises:
        PluginError: the plugin that reads it is broken.
    """
    engine = LookEngine(part.engine)
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    try:
        report = load(engine, checkpoint, host=host, progress="never")
        report.lease.close()
        notes = report.notes
    except (CheckpointError, IdentityMismatchError, LoadError) as exc:
        faults = (str(exc),)
    files: dict[Path, list[TensorMeta]] = {}
    twins = stored_names(engine.metas.values())
    for name, meta in engine.metas.items():
        if name not in twins and meta.file is not None:
            files.setdefault(meta.file, []).append(meta)
    ties = itertools.groupby(sorted(twins, key=lambda tie: twins[tie]), key=lambda tie: twins[tie])
    return Inspection(
        root=checkpoint,
        kind="safetensors" if all(file.suffix == ".safetensors" for file in files) else "weights",
        index=None,
        files=files,
        ties=tuple(((name, *others), "one place in its file") for name, others in ties),
        faults=faults,
        notes=(*part.notes, *notes),
        part=part,
        layout=engine.layout,
    )


class LookEngine(Engine):
    """Takes what it is given and reads nothing of it."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = taking_anything(info)
        self.metas: Mapping[str, TensorMeta] = {}
        self.layout = Layout.CHECKPOINT

    @property
    def info(self) -> EngineInfo:
        """The engine that a part was cut for."""
        return self._info

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return what there was."""
        del layout
        return self.metas

    def untouched(self) -> bool:
        """There is nothing to touch."""
        return True

    def apply(self, weights: WeightSet) -> Applied:
        """Remember what there is."""
        self.layout, self.metas = weights.layout, dict(weights.metas)
        return Applied(written=self.metas, unused=())

    def bind(self, weights: WeightSet) -> Applied:
        """Remember what there is."""
        return self.apply(weights)

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Answer for the ranks that are not here."""
        del timeout
        return [value] * self._info.topology.world.size
