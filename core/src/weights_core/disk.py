# SPDX-License-Identifier: Apache-2.0
"""The built-in source: a checkpoint on disk, read plainly. Always the last in a plan."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from weights_core.checkpoint import find
from weights_core.hookspecs import hookimpl
from weights_core.plugin import ProviderPlugin
from weights_core.shards import Shard, open_shards
from weights_core.types import FormatClaim, LoadRequest, Role, TensorMeta
from weights_core.weightset import Allocate, Parts, Slices, Target, WeightSet

if TYPE_CHECKING:
    import torch

    from weights_core.engine import Engine
    from weights_core.source import Source


class ShardSet(WeightSet):
    """A checkpoint's files as one set, read one tensor after the other, by file and offset.

    Every tensor has memory of its own, so one that is kept never changes, and its memory is freed
    with it. Subclasses read the same `shards` in other ways.
    """

    def __init__(self, shards: Sequence[Shard], *, provider: str, notes: tuple[str, ...] = ()) -> None:
        self.provider = provider
        self.shards = tuple(shards)
        self._home = {name: shard for shard in shards for name in shard.metas}
        self._metas = MappingProxyType({name: s.metas[name] for name, s in self._home.items()})
        self._position = {name: index for index, name in enumerate(self._metas)}
        self._notes = notes
        self._bytes = 0
        self._lent: list[weakref.ref[torch.UntypedStorage]] = []
        self._lock = threading.Lock()

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """By file, then by offset."""
        return self._metas

    @property
    def bytes_read(self) -> int:
        """Bytes of the tensors handed out so far."""
        return self._bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over, and how much is in use where it lies."""
        storages = (ref() for ref in self._lent)
        size = sum(storage.nbytes() for storage in storages if storage is not None)
        if not size:
            return self._notes
        return (
            *self._notes,
            f"{size / 1e6:,.1f} MB are used where they lie in the files, which must not be "
            "overwritten in place while the model lives",
        )

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read a tensor or a part of it."""
        tensor = self._home[name].read(name, slices)
        self.count(tensor.nbytes)
        return tensor

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out`, without a copy where it is contiguous host memory."""
        self._home[name].read_into(name, out, slices)
        self.count(out.nbytes)

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read by file and offset."""
        for name in self.in_order(names):
            yield name, self.read(name)

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Map by file and offset."""
        slices = names if isinstance(names, Mapping) else {}
        for name in self.in_order(names):
            yield from self.map_one(name, slices.get(name))

    def map_one(self, name: str, slices: Slices | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a tensor that can be mapped, and count it; or nothing."""
        tensor = self._home[name].mapped(name, slices)
        if tensor is not None:
            with self._lock:
                self._bytes += tensor.nbytes
                self._lent.append(weakref.ref(tensor.untyped_storage()))
            yield name, tensor

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill by file and offset."""
        return super().fill(self.sorted(targets))

    def in_order(self, names: Collection[str] | None) -> list[str]:
        """Return `names`, or all, by file and offset.

        Raises:
            KeyError: the set has no tensor of one of the names.
        """
        return list(self._metas) if names is None else sorted(set(names), key=self._position.__getitem__)

    def sorted(self, targets: Iterable[Target]) -> list[Target]:
        """Return the targets by file and offset.

        Raises:
            KeyError: the set has no tensor of one of the names.
        """
        return sorted(targets, key=lambda target: self._position[target.name])

    def release(self, names: Iterable[str]) -> int:
        """Forget mapped tensors; their memory is not this set's, so no bytes are claimed as freed."""
        for name in names:
            self._home[name].release(name)
        return 0

    def allocate_from(self, allocate: Allocate) -> None:
        """Make what is read from now on in what `allocate` returns."""
        for shard in self.shards:
            shard.allocate = allocate

    def close(self) -> None:
        """Close the files."""
        for shard in self.shards:
            shard.close()

    def shard_of(self, name: str) -> Shard:
        """Return the file that holds a tensor."""
        return self._home[name]

    def count(self, size: int) -> None:
        """Add the bytes of what was read to `bytes_read`."""
        with self._lock:
            self._bytes += size


class DiskPlugin(ProviderPlugin[None]):
    """Reads safetensors and torch files, one tensor after the other."""

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim any checkpoint, as the last resort."""
        return FormatClaim(roles={Role.SOURCE}, reason="reads any checkpoint, one tensor after the other")

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Validate the whole checkpoint and return it as a lazily read set."""
        found = find(request.checkpoint, request.engine.component, request.is_pipeline)
        return ShardSet(open_shards(found), provider="disk", notes=found.notes)
