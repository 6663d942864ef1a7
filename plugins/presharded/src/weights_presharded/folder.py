# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder that was cut for ranks: whether it is one, and this rank's part of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from weights_core import Declined, EngineInfo, FormatClaim, Layout, LoadRequest, Role, Topology
from weights_core.errors import CheckpointError
from weights_core.types import Axis, Fit, Part
from weights_presharded.manifest import JOURNAL, RANK_FOLDER, READY, RankManifest, Ready, said
from weights_presharded.vllm import is_vllm, ranks_of

if TYPE_CHECKING:
    from weights_core import WeightSet

Kind = Literal["ready", "unfinished", "vllm"]


def kind_of(folder: Path) -> Kind | None:
    """Return what a folder is, from the names in it."""
    if (folder / READY).is_file():
        return "ready"
    if (folder / JOURNAL).is_file() or _has_ranks(folder):
        return "unfinished"
    return "vllm" if is_vllm(folder) else None


def _has_ranks(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(RANK_FOLDER.fullmatch(entry.name) and entry.is_dir() for entry in entries)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def root_of(request: LoadRequest) -> Path:
    """Return the folder of the request's component, where there is one, else the checkpoint itself."""
    component = request.engine.component
    inside = request.checkpoint / component if component else None
    return inside if inside is not None and kind_of(inside) else request.checkpoint


def claim_of(request: LoadRequest) -> FormatClaim | None:
    """Return the claim on a checkpoint that was cut for ranks, or None if it was not."""
    root = root_of(request)
    kind = kind_of(root)
    if kind is None:
        return None
    layout, reason = Layout.SHARDED, f"{root} was cut for ranks: this rank's files, and no other"
    parts = [Part(engine=_engine(request))]
    try:
        if kind == "ready":
            ready = Ready.read(root)
            layout, parts = ready.layout, _parts(ready, request)
        elif kind == "vllm":
            size = ranks_of(root)
            parts = [Part(engine=_engine(request, Topology.tensor_parallel(size, r))) for r in range(size)]
    except CheckpointError as exc:
        reason = exc.brief  # said again, as an error, by the load
    return FormatClaim(roles={Role.SOURCE}, layouts={layout}, fit=Fit.BEST, reason=reason, parts=parts)


def _engine(request: LoadRequest, topology: Topology | None = None) -> EngineInfo:
    return EngineInfo(
        name="any", version="", component=request.engine.component, topology=topology or Topology()
    )


def _parts(ready: Ready, request: LoadRequest) -> list[Part]:
    """Return a part for each rank, and for the engine that may load it."""
    made = f"saved by {ready.maker.name} {ready.maker.version}" if ready.maker else "cut by a plan"
    note = f"presharded: {made} for {said(ready.axes)}, of the checkpoint {ready.digest}"
    parts = []
    for number, rank in enumerate(ready.ranks):
        axes = {name: Axis(size, rank.axes[name]) for name, size in ready.axes.items()}
        info = _engine(request, Topology(Axis(len(ready.ranks), number), axes))
        info = attrs.evolve(info, component=info.component or ready.component)
        if ready.maker is not None:
            info = attrs.evolve(info, **attrs.asdict(ready.maker))
        parts.append(Part(engine=info, notes=(note,)))
    return parts


def open_folder(request: LoadRequest, *, verify: bool) -> WeightSet:
    """Return the set of the request's rank.

    Raises:
        Declined: the checkpoint was not cut for ranks.
        CheckpointError: it is unfinished or damaged; names file and tensor.
        IdentityMismatchError: it was cut for others; says for whom.
    """
    root, info = root_of(request), request.engine
    kind = kind_of(root)
    if kind is None:
        raise Declined(f"{root} was not cut for ranks")
    if kind == "unfinished":
        raise CheckpointError(
            f"has no {READY}: what cut or saved it was interrupted. `weights shard … --resume` completes "
            "what was cut; what an engine saved must be saved again",
            file=root,
        )
    if kind == "vllm":
        from weights_presharded.vllm import open_vllm

        return open_vllm(root, info)
    from weights_presharded.reading import open_rank

    ready = Ready.read(root)
    entry = ready.rank_for(info, root)
    folder = root / entry.folder
    return open_rank(folder, RankManifest.read(folder, entry.manifest), layout=ready.layout, verify=verify)
