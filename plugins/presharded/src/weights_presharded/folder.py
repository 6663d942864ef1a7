# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder that was cut for ranks: whether it is one, and this rank's part of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weights_core import Declined, FormatClaim, Layout, LoadRequest, Role
from weights_core.errors import CheckpointError
from weights_core.types import Fit
from weights_presharded.manifest import JOURNAL, RANK_FOLDER, READY, RankManifest, Ready
from weights_presharded.vllm import is_vllm

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
    if kind == "ready":
        try:
            layout = Ready.read(root).layout
        except CheckpointError as exc:
            reason = exc.brief  # said again, as an error, by the load
    return FormatClaim(roles={Role.SOURCE}, layouts={layout}, fit=Fit.BEST, reason=reason)


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
