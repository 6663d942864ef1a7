# SPDX-License-Identifier: Apache-2.0
"""The ranks of a tensor-parallel model, and how they talk during a load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from weights_core import Axis, Topology


class Group:
    """All ranks of `torch.distributed`, over gloo: what is exchanged are a few bytes."""

    def __init__(self) -> None:
        self._group: Any = None

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Return every rank's value, by rank. The first timeout holds for all calls.

        Raises:
            TimeoutError: a rank stayed away.
        """
        begin = time.monotonic()
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            everyone: list[object] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, value, group=self._group)
        except RuntimeError as exc:  # gloo has no error of its own for a timeout
            if time.monotonic() - begin >= timeout * 0.99:
                raise TimeoutError(f"no answer from all ranks in {timeout:g} s: {exc}") from exc
            raise
        return everyone


def topology_of(mesh: Any) -> Topology:
    """Return where this process stands in a device mesh; axes of size 1 are left out."""
    names = mesh.mesh_dim_names or ()
    axes = {name: Axis(mesh.size(dim), mesh.get_local_rank(dim)) for dim, name in enumerate(names)}
    return Topology(
        world=Axis(dist.get_world_size(), dist.get_rank()),
        axes={name: axis for name, axis in axes.items() if axis.size > 1},
    )
