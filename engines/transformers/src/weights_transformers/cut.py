# SPDX-License-Identifier: Apache-2.0
"""What to say of a part of a checkpoint, one file or a folder that was cut, where a whole one is due."""

from __future__ import annotations

import re
from pathlib import Path

from weights_core import PluginHost
from weights_core.checkpoint import CheckpointFiles, find
from weights_core.errors import CheckpointError
from weights_core.parts import parts_of


def find_whole(path: Path, component: str | None, host: PluginHost | None, size: int) -> CheckpointFiles:
    """Find the files of a checkpoint, as `find`; `size` is the number of ranks that are to load it.

    Raises:
        CheckpointError: there is none, or one of its files alone is given; of a folder that was cut it says
            for how many ranks, and what to do.
    """
    try:
        found = find(path, component)
    except CheckpointError as exc:
        parts = parts_of(host or PluginHost.discover(), path, component)
        if not parts:
            raise
        topology = parts[0].engine.topology
        cut = topology.world.size
        known = _ranks(cut) if topology.axes else "ranks"  # of what was interrupted nothing is known
        plan = ", tp_plan='auto'" if cut > 1 else ""
        other = f", on {_ranks(cut)} and not {_ranks(size)}" if topology.axes and cut != size else ""
        raise CheckpointError(
            f"was cut for {known}, and does not say what the whole model is. Open the engine from the "
            f"checkpoint that it was cut from{other}, and load these weights: engine = open_engine(…, "
            f"'ORIGINAL'{plan}); weights_core.load(engine, {str(path)!r}, 'presharded')",
            file=path,
        ) from exc
    numbered = re.search(r"-of-0*(\d+)$", path.stem)
    if found.files == (path,) and numbered is not None and numbered[1] != "1":
        raise CheckpointError(f"is one of {numbered[1]} files: give their folder, or the index", file=path)
    return found


def _ranks(size: int) -> str:
    return "one rank" if size == 1 else f"{size} ranks"
