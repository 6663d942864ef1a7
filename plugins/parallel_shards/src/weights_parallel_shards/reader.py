# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's files as one set, read in chunks by several threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch

from weights_core.disk import ShardSet
from weights_core.shards import SafetensorsShard, Shard, aligned
from weights_core.tensors import allocate
from weights_core.weightset import Parts, Slices, Target, check_destination, normalise
from weights_parallel_shards import aio
from weights_parallel_shards.ahead import ReadAhead, extents
from weights_parallel_shards.chunks import Chunk, Item, Piece, boxes, gather, selection, span
from weights_parallel_shards.lanes import Lane, integers
from weights_parallel_shards.run import Run
from weights_parallel_shards.storage import Storage
from weights_parallel_shards.transfer import Channel, Ring, Transfer
from weights_parallel_shards.tuning import Tuning
from weights_parallel_shards.window import Window

T = TypeVar("T")


def channel_to(device: torch.device) -> Channel | None:
    """Return how bytes get to `device` if it copies by itself, else None: then torch copies."""
    if device.type != "cuda" or not aio.is_available():
        return None
    from weights_parallel_shards.cuda import CudaChannel, runtime

    library = runtime()
    return None if library is None else CudaChannel(device, library)


class ParallelSet(ShardSet):
    """A checkpoint's files as one set, read in chunks by several threads.

    `fill` reads straight into targets in host memory, and through a ring of pinned memory into those
    on CUDA. `stream` reads ahead of the consumer within the tuning's window; what it has yielded is
    the consumer's and is not counted. Each pass has threads and staging memory of its own; staging
    memory is kept for the next pass until the set is closed. What is `mapped` threads bring in ahead.

    A file of `torch.save` takes part tensor by tensor: several are read at a time, as they are mapped.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        notes: tuple[str, ...] = (),
        tuning: Tuning,
        device_tuning: Tuning | None = None,
        channel_to: Callable[[torch.device], Channel | None] = channel_to,
    ) -> None:
        """Take over open `shards`.

        Args:
            shards: the files.
            notes: what was passed over.
            tuning: for reading into host memory.
            device_tuning: for reading to a device that copies by itself; `tuning` if not given.
            channel_to: returns how bytes get to a device that copies by itself, None for others.
        """
        super().__init__(shards, provider="parallel_shards", notes=notes)
        self.allocate_from(allocate)
        self._tuning = tuning
        self._device_tuning = device_tuning or tuning
        self._channel_to = channel_to
        self._storages: dict[Shard, Storage] = {
            shard: Storage(shard.file, tuning.direct)
            for shard in self.shards
            if isinstance(shard, SafetensorsShard)
        }
        self._lanes: list[Lane] = []
        self._rings: dict[torch.device, list[Ring]] = {}
        self._runs: list[Run[Any] | Transfer[Any] | ReadAhead] = []

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read a tensor or a part of it: what is large in parallel, the rest plainly."""
        shard = self.shard_of(name)
        meta = self.meta(name)
        if not isinstance(shard, SafetensorsShard) or meta.nbytes <= self._tuning.inline:
            return super().read(name, slices)
        dtype, ranges = shard.torch_dtype(meta), normalise(slices, meta.torch_shape)
        first, _, _ = selection(meta.torch_shape, ranges, dtype.itemsize)
        assert meta.offset is not None
        out = _made(shard, tuple(len(chosen) for chosen in ranges), dtype, meta.offset + first)
        self.read_into(name, out, slices)
        return out

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out`: what is large in parallel, the rest plainly."""
        if self.meta(name).nbytes <= self._tuning.inline:
            super().read_into(name, out, slices)
        else:
            for _ in self.fill([Target(name, out, slices)]):
                pass

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors as they come in, begun by file and offset."""
        return self._stream(self.in_order(names))

    def mapped(self, names: Parts | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Map by file and offset, nothing if reads are to be direct; threads read what is not cached."""
        order = self.in_order(names)
        if self._tuning.direct == "always":
            return
        slices = names if isinstance(names, Mapping) else {}
        ahead = ReadAhead(extents(order, self.shard_of, slices), max(1, self._tuning.readers // 2))
        self._runs.append(ahead)
        try:
            ahead.start(lambda shard, offset: bool(self._storages[shard].is_cached(offset)))
            for name in order:
                ahead.wait(name)
                yield from self.map_one(name, slices.get(name))
        finally:
            ahead.stop()
            self._runs.remove(ahead)

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill the targets, begun by file and offset, and yield each as it is done."""
        return self._fill(self.sorted(targets))

    def close(self) -> None:
        """Stop what is still being read, join the threads, close the files and free staging memory."""
        for run in list(self._runs):
            run.stop()
        for storage in self._storages.values():
            storage.close()
        self._lanes.clear()
        self._rings.clear()
        super().close()

    def _stream(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        chunks: list[Chunk] = []
        items: list[Item[tuple[str, torch.Tensor]]] = []
        limit = self._tuning.chunk
        for shard, group in groupby(names, self.shard_of):
            pieces: list[Piece] = []
            for name in group:
                item = _streamed(shard, name)
                items.append(item)
                meta = shard.metas[name]
                if not isinstance(shard, SafetensorsShard):
                    chunks.append(Chunk(shard.path, None, items=[item]))
                elif meta.nbytes:
                    assert meta.offset is not None
                    pieces += span(item, meta.offset, meta.nbytes, limit)
            if pieces:
                chunks += gather(self._storages[shard], pieces, limit, windowed=True)
        yield from self._run(items, chunks)

    def _fill(self, targets: list[Target]) -> Iterator[Target]:
        for target in targets:
            self._check(target)
        by_device: dict[torch.device, list[Target]] = {}
        for target in targets:
            by_device.setdefault(target.out.device, []).append(target)
        for device, group in by_device.items():
            yield from self._fill_on(device, group)

    def _check(self, target: Target) -> None:
        shard = self.shard_of(target.name)
        if isinstance(shard, SafetensorsShard):
            meta = shard.metas[target.name]
            shape = meta.torch_shape
            if target.slices:
                shape = tuple(len(chosen) for chosen in normalise(target.slices, shape))
            check_destination(target.name, target.out, shape, shard.torch_dtype(meta))

    def _fill_on(self, device: torch.device, targets: list[Target]) -> Iterator[Target]:
        ring = self._ring(device)
        by_address = ring is not None or device.type == "cpu"
        limit = (self._tuning if ring is None else self._device_tuning).chunk
        chunks: list[Chunk] = []
        items: list[Item[Target]] = []
        for shard, group in groupby(targets, lambda target: self.shard_of(target.name)):
            pieces: list[Piece] = []
            for target in group:
                item = Item(target.name, target.out.nbytes, result=target)
                items.append(item)
                if isinstance(shard, SafetensorsShard):
                    pieces += _pieces(shard, target, item, limit, by_address=by_address)
                else:
                    item.begin = _reading(shard, target)
                    chunks.append(Chunk(shard.path, None, items=[item]))
            if pieces:
                chunks += gather(self._storages[shard], pieces, limit, windowed=False)
        if ring is None or any(chunk.storage is None for chunk in chunks):  # torch's files copy themselves
            yield from self._run(items, chunks)
            return
        transfer = Transfer(items, chunks, ring, self.count)
        self._runs.append(transfer)
        try:
            yield from transfer.results()
        finally:
            self._runs.remove(transfer)
            self._rings.setdefault(device, []).append(ring)

    def _ring(self, device: torch.device) -> Ring | None:
        """Return staging memory for a device that copies by itself, for one pass alone."""
        idle = self._rings.get(device)
        if idle:
            return idle.pop()
        channel = self._channel_to(device)
        return None if channel is None else Ring(channel, self._device_tuning)

    def _run(self, items: list[Item[T]], chunks: list[Chunk]) -> Iterator[T]:
        tuning, idle = self._tuning, self._lanes
        inline = sum(item.size for item in items) <= tuning.inline
        count = 1 if inline else min(tuning.readers, len(chunks))
        lanes = [idle.pop() if idle else Lane(tuning) for _ in range(count)]
        run = Run(items, chunks, lanes, idle, Window(tuning.window), self.count)
        self._runs.append(run)
        try:
            yield from run.results(inline=inline)
        finally:
            self._runs.remove(run)


def _streamed(shard: Shard, name: str) -> Item[tuple[str, torch.Tensor]]:
    meta = shard.metas[name]
    item = Item[tuple[str, torch.Tensor]](name, meta.nbytes, meta.nbytes)
    if isinstance(shard, SafetensorsShard):
        dtype = shard.torch_dtype(meta)

        def begin() -> None:
            tensor = _made(shard, meta.torch_shape, dtype, meta.offset or 0)
            item.result, item.address = (name, tensor), tensor.data_ptr()
    else:

        def begin() -> None:
            item.result = (name, shard.read(name))

    item.begin = begin
    return item


def _made(shard: Shard, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Return memory to read byte `offset` of a file into, from whoever was asked to allocate."""
    assert shard.allocate is not None
    raw = shard.allocate(math.prod(shape) * dtype.itemsize, aligned(offset, dtype))
    return raw.view(dtype).view(shape)


def _reading(shard: Shard, target: Target) -> Callable[[], None]:
    return lambda: shard.read_into(target.name, target.out, target.slices)


def _pieces(
    shard: SafetensorsShard, target: Target, item: Item[Target], limit: int, *, by_address: bool
) -> Iterator[Piece]:
    meta, out = shard.metas[target.name], target.out
    if not item.size:
        return
    assert meta.offset is not None
    begin, is_whole = meta.offset, True
    if target.slices:
        ranges = normalise(target.slices, meta.torch_shape)
        first, _, strides = selection(meta.torch_shape, ranges, out.element_size())
        begin, is_whole = begin + first, strides in ((), (1,))
    if not is_whole or not out.is_contiguous() or not by_address:
        rows = [1]
        for length in reversed(meta.torch_shape[1:]):
            rows.append(rows[-1] * length)
        yield from boxes(item, begin, rows[::-1][: out.dim()], integers(out), limit)
        return
    item.address = out.data_ptr()
    yield from span(item, begin, item.size, limit)
