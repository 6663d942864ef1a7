# SPDX-License-Identifier: Apache-2.0
"""What `weights check presharded` tries the plugin on: folders that were cut for one rank, and a peer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from weights_core.testing.contract import Subject

SETTINGS: Mapping[str, Any] = {"source": False, "target": False}
"""For folders: what peers have is not what the clauses prepare."""

EXCLUSIONS = {
    "bytes_read_are_those_delivered": "a part of a tensor is read whole, to be verified; engines take what "
    "was cut for them whole, and then it is exact"
}

PEER_EXCLUSIONS = {
    "a_damaged_checkpoint_is_an_error": "peers are asked for the weights of a digest, and nobody has "
    "those of damaged files: none serves, and the disk, which reads them, says what is wrong with them"
}
"""For both ways in which a peer's weights land."""
OWN_EXCLUSIONS = PEER_EXCLUSIONS | {
    "what_was_released_is_freed": "the tensors become the engine's parameters by `bind`, without a copy, so "
    "there is nothing besides the model that could be freed"
}
"""Where they land in memory of their own."""


def peer_settings(folder: Path, *, in_place: bool) -> dict[str, Any]:
    """Return the settings of an engine that pulls what `Neighbour.prepare` has served."""
    from weights_presharded.peer.neighbour import REGISTRY

    return {"registry": str(folder / REGISTRY), "source": False, "target": True, "in_place": in_place}


def prepare(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write tensors as `weights shard --tp 1` does."""
    from weights_core.testing.checkpoints import write_three_files
    from weights_presharded.converting import shard
    from weights_presharded.plan import WHOLE, Plan

    source = write_three_files(folder / "whole", tensors)
    shard(source, folder / "cut", size=1, plan=Plan((WHOLE,), "the contract", ""))
    shutil.rmtree(folder / "whole")
    return folder / "cut"


def oracle(path: Path) -> dict[str, torch.Tensor]:
    """Read them back with the safetensors library."""
    from safetensors.torch import load_file

    (folder,) = path.glob("rank-*")
    found = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    ties = json.loads((folder / "manifest.json").read_bytes())["ties"]
    return found | {name: found[stored] for name, stored in ties.items()}


def subjects(settings: Mapping[str, object]) -> list[tuple[Subject, Mapping[str, str]]]:
    """Return what to try, the plugin as a source of such folders, and what cannot hold."""
    from weights_core.testing.checkpoints import every_dtype, read_with_safetensors
    from weights_core.testing.contract.model import Subject
    from weights_core.types import Role
    from weights_presharded.peer.neighbour import Neighbour
    from weights_presharded.plugin import PreshardedPlugin

    neighbour = Neighbour()

    def from_a_peer(*, in_place: bool) -> Subject:
        where = "its parameters" if in_place else "memory of their own"
        return Subject(
            name="presharded",
            what=f"of what a peer has, into {where}",
            plugin=PreshardedPlugin,
            role=Role.SOURCE,
            config=lambda folder: {**peer_settings(folder, in_place=in_place), **settings},
            prepare=neighbour.prepare,
            oracle=read_with_safetensors,
            dtypes=every_dtype(),
        )

    from_disk = Subject(
        name="presharded",
        what="of folders that were cut",
        plugin=PreshardedPlugin,
        role=Role.SOURCE,
        config=lambda _folder: {**SETTINGS, **settings},
        prepare=prepare,
        oracle=oracle,
        dtypes=every_dtype(),
    )
    return [
        (from_disk, EXCLUSIONS),
        (from_a_peer(in_place=True), PEER_EXCLUSIONS),
        (from_a_peer(in_place=False), OWN_EXCLUSIONS),
    ]
