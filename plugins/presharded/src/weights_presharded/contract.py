# SPDX-License-Identifier: Apache-2.0
"""What `weights check presharded` tries the plugin on: folders that were cut for one rank."""

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
"""No peers: what they have is not what the clauses prepare."""


EXCLUSIONS = {
    "bytes_read_are_those_delivered": "a part of a tensor is read whole, to be verified; engines take what "
    "was cut for them whole, and then it is exact"
}


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
    from weights_core.testing.checkpoints import every_dtype
    from weights_core.testing.contract.model import Subject
    from weights_core.types import Role
    from weights_presharded.plugin import PreshardedPlugin

    subject = Subject(
        name="presharded",
        plugin=PreshardedPlugin,
        role=Role.SOURCE,
        config=lambda _folder: {**SETTINGS, **settings},
        prepare=prepare,
        oracle=oracle,
        dtypes=every_dtype(),
    )
    return [(subject, EXCLUSIONS)]
