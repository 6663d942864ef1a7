# SPDX-License-Identifier: Apache-2.0
"""Folders that vLLM saved with `save_sharded_state`: `model-rank-R-part-P.safetensors`, unquantised."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from weights_core import EngineInfo, Layout
from weights_core.checkpoint import CheckpointFiles
from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, IdentityMismatchError
from weights_core.shards import open_shards
from weights_presharded.manifest import said

if TYPE_CHECKING:
    from weights_presharded.reading import RankSet

_FILE = re.compile(r"model-rank-(\d{1,6})-part-(\d{1,6})\.safetensors")
_WHY = (
    "vLLM saves after its post-load, which changes quantised weights, and would change them again when they "
    "are loaded: cut the original checkpoint with `weights shard`"
)
_REARRANGED = (
    "vLLM saves after its post-load, and would do that again when they are loaded: cut the original "
    "checkpoint with `weights shard`"
)
_QUANTISED = re.compile(r"(^|\.)(weight_scale\w*|input_scale|[qg]weight|qzeros|g_idx|scales|weight_packed)$")


def is_vllm(folder: Path) -> bool:
    """Whether a folder holds such files."""
    try:
        with os.scandir(folder) as entries:
            return any(_FILE.fullmatch(entry.name) for entry in entries)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def open_vllm(folder: Path, info: EngineInfo) -> RankSet:
    """Open the files of an engine's rank.

    Raises:
        CheckpointError: files are missing, of quantised weights, or what post-load has made of others.
        IdentityMismatchError: they were saved for another number of ranks.
    """
    from weights_presharded.reading import RankSet  # every load asks `is_vllm`, few come here

    parts = _parts(folder)
    axes = {name: axis for name, axis in info.topology.axes.items() if axis.size > 1}
    rank, size = (axes["tp"].rank, axes["tp"].size) if "tp" in axes else (0, 1)
    if axes.keys() - {"tp"} or len(parts) != size:
        have = {"tp": len(parts)} if len(parts) > 1 else {}
        need = {name: axis.size for name, axis in axes.items()}
        raise IdentityMismatchError(
            f"{folder} was saved by vLLM for {said(have)}, this engine needs {said(need)}; what is cut is "
            "never cut again: save it with as many ranks, or cut the whole checkpoint with `weights shard`",
            fields={"axes": (need, have)},
        )
    _refuse_quantised(folder, info)
    if info.post_load_writes is not None:
        raise CheckpointError(f"{info.post_load_writes}. {_REARRANGED}", file=folder)
    files = tuple(folder / f"model-rank-{rank}-part-{part}.safetensors" for part in range(parts[rank]))
    inner = ShardSet(
        open_shards(CheckpointFiles(root=folder, kind="safetensors", files=files)), provider="presharded"
    )
    try:
        for name, meta in inner.metas.items():
            if _QUANTISED.search(name) or meta.dtype.startswith(("F8", "F6", "F4")):
                raise CheckpointError(f"is of quantised weights. {_WHY}", file=meta.file, tensor=name)
    except BaseException:
        inner.close()
        raise
    note = f"presharded: {folder}, rank {rank} of vLLM's sharded state, which has no digests to verify"
    return RankSet(inner, layout=Layout.SHARDED, notes=(note,))


def ranks_of(folder: Path) -> int:
    """Return for how many ranks a folder was saved.

    Raises:
        CheckpointError: files are missing.
    """
    return len(_parts(folder))


def _parts(folder: Path) -> list[int]:
    """Return the number of parts of each rank."""
    found: dict[int, set[int]] = {}
    for entry in folder.iterdir():
        match = _FILE.fullmatch(entry.name)
        if match:
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    for rank in range(max(found) + 1):
        parts = found.get(rank)
        if not parts or parts != set(range(len(parts))):
            lost = next(part for part in range(len(parts or ()) + 1) if part not in (parts or ()))
            raise CheckpointError(f"model-rank-{rank}-part-{lost}.safetensors is missing", file=folder)
    return [len(found[rank]) for rank in range(len(found))]


def _refuse_quantised(folder: Path, info: EngineInfo) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"cannot be read: {exc}", file=path) from exc
    names = (
        [key for key in ("quantization_config", "compression_config") if config.get(key)]
        if isinstance(config, dict)
        else []
    )
    if names or info.quantization:
        what = f"has a {names[0]}" if names else f"the engine's quantisation is {info.quantization}"
        raise CheckpointError(f"is of quantised weights ({what}). {_WHY}", file=path if names else folder)
