# SPDX-License-Identifier: Apache-2.0
"""The ranks of a tensor-parallel model, and how they talk during a load."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from weights_core import Axis, Topology
from weights_core.errors import EngineError, RanksDisagreeError
from weights_core.ranks import gathered

T = TypeVar("T")


class Ranks:
    """All ranks of `torch.distributed`, and where this one stands in the mesh of the model."""

    def __init__(self, mesh: Any, timeout: float) -> None:
        """Take over a mesh; `timeout` is how long a rank waits for the others until the core says."""
        self.topology = topology_of(mesh)
        self.device = _device_of(mesh.device_type)
        self.timeout = timeout
        self._group: Any = None

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Return every rank's value, by rank, over gloo: what is exchanged are a few bytes.

        Raises:
            TimeoutError: a rank stayed away.
        """
        self.timeout = timeout
        begin = time.monotonic()
        wait = timedelta(seconds=timeout)
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=wait)
            # a collective waits as long as its group was made to, this as long as it is told
            dist.monitored_barrier(self._group, timeout=wait, wait_all_ranks=True)
            everyone: list[object] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, value, group=self._group)
        except RuntimeError as exc:  # gloo has no error of its own for a timeout
            if time.monotonic() - begin >= timeout * 0.99:
                raise TimeoutError(f"no answer from all ranks in {timeout:g} s: {exc}") from exc
            raise
        return everyone

    def ask(self, value: object, where: str) -> Sequence[object]:
        """Gather, waiting as long as the time before.

        Raises:
            RanksDisagreeError: the others cannot be reached.
        """
        return gathered(self.gather, self.topology.world, value, self.timeout, where)


def topology_of(mesh: Any) -> Topology:
    """Return where this process stands in a device mesh; axes of size 1 are left out."""
    names = mesh.mesh_dim_names or ()
    axes = {name: Axis(mesh.size(dim), mesh.get_local_rank(dim)) for dim, name in enumerate(names)}
    return Topology(
        world=Axis(dist.get_world_size(), dist.get_rank()),
        axes={name: axis for name, axis in axes.items() if axis.size > 1},
    )


def ranks_of(arguments: Mapping[str, Any], timeout: float) -> Ranks | None:
    """Return the ranks over which Transformers will spread a model, or None if it won't.

    Transformers starts `torch.distributed` here if nobody has.

    Raises:
        EngineError: Transformers refuses.
    """
    asked = arguments.get("distributed_config")
    if asked is None:
        return None
    from transformers import PreTrainedModel

    try:
        _, _, manager = PreTrainedModel.prepare_distribute_model(asked, arguments.get("device_map"))
    except Exception as exc:  # Transformers may raise anything
        raise EngineError(f"Transformers refuses to use several ranks: {type(exc).__name__}: {exc}") from exc
    return None if manager is None else Ranks(manager.get_mesh(("pp", "fsdp", "tp")), timeout)


def opened_together(ranks: Ranks, step: Callable[[], T], seen: Callable[[T], str]) -> T:
    """Do what opens a checkpoint, and go on only if every rank could, and has `seen` the same.

    Raises:
        Exception: what `step` or `seen` raised.
        RanksDisagreeError: another rank failed, or sees another checkpoint.
    """
    where = "where the model is opened"
    try:
        opened = step()
        mine = seen(opened)
    except Exception as exc:
        with contextlib.suppress(RanksDisagreeError):  # the error that is raised says more
            ranks.ask(("", str(exc)), where)
        raise
    for rank, theirs in enumerate(ranks.ask((mine, None), where)):
        what, failed = theirs if isinstance(theirs, tuple) and len(theirs) == 2 else ("another step", None)
        if failed is not None:
            raise RanksDisagreeError(f"rank {rank} could not open the model: {failed}")
        if what != mine:
            raise RanksDisagreeError(f"rank {rank} opens {what}, rank {ranks.topology.rank} {mine}")
    return opened


def _device_of(kind: str) -> str:
    return kind if kind == "cpu" else f"{kind}:{torch.get_device_module(kind).current_device()}"
