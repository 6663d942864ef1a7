# SPDX-License-Identifier: Apache-2.0
"""Move bytes from a checkpoint's files to the ranks' files, in blocks, hashing them on their way."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import xxhash

from weights_core import TensorMeta
from weights_core.errors import CheckpointError
from weights_core.shards import SafetensorsShard, Shard
from weights_presharded.outputs import Output, Part, Span
from weights_presharded.rankfiles import OpenFile

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 20
"""Bytes that are read, hashed and written at a time: they stay in the processor's cache meanwhile."""


@attrs.define
class Sink:
    """Where the bytes of one tensor go: to the same place in the file of each rank that has them.

    `rank` is one of these ranks.
    """

    rank: int
    files: Sequence[OpenFile]
    offset: int
    hasher: xxhash.xxh3_128 = attrs.field(factory=xxhash.xxh3_128)

    def write(self, data: memoryview) -> None:
        """Write what comes next."""
        self.hasher.update(data)
        for file in self.files:
            file.write(data, self.offset)
        self.offset += len(data)

    @property
    def digest(self) -> str:
        """The digest of what was written."""
        return f"xxh3_128:{self.hasher.hexdigest()}"


class Reader:
    """Reads any bytes of any tensor of a checkpoint."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.metas: Mapping[str, TensorMeta] = {n: meta for s in shards for n, meta in s.metas.items()}
        self._home = {name: shard for shard in shards for name in shard.metas}

    def open(self, name: str) -> Bytes:
        """Return the bytes of a tensor: in their file, or in memory if it must be unpickled."""
        shard = self._home[name]
        if isinstance(shard, SafetensorsShard):
            return FileBytes(shard, self.metas[name])
        return HeldBytes(shard.read(name))


class FileBytes:
    """A tensor's bytes in a safetensors file."""

    def __init__(self, shard: SafetensorsShard, meta: TensorMeta) -> None:
        self._shard = shard
        self._meta = meta

    def read_into(self, out: memoryview, offset: int) -> None:
        """Read from `offset` bytes into the tensor."""
        assert self._meta.offset is not None
        try:
            self._shard.file.read_into(out, self._meta.offset + offset)
        except CheckpointError as exc:
            exc.tensor = self._meta.name
            raise


class HeldBytes:
    """A tensor's bytes in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        from weights_core.tensors import as_bytes

        self._tensor = as_bytes(tensor)  # keeps what the view looks at
        self._view = view_of(self._tensor)

    def read_into(self, out: memoryview, offset: int) -> None:
        """Copy from `offset` bytes into the tensor."""
        out[:] = self._view[offset : offset + len(out)]


Bytes = FileBytes | HeldBytes


class Cutter:
    """Cuts tensors, one at a time; each thread has its own. `stop` ends it within a block."""

    def __init__(self, reader: Reader, stop: threading.Event) -> None:
        self._reader = reader
        self._stop = stop
        self._block = bytearray(BLOCK)
        self._scratch = bytearray(BLOCK)

    def cut(self, output: Output, files: Sequence[OpenFile], offset: int) -> list[str]:
        """Write a tensor to each rank's file at `offset`; return its digests by rank.

        Raises:
            CheckpointError: a file cannot be read or written; names file and tensor.
        """
        alike: dict[object, list[int]] = {}
        for rank in range(len(files)):
            alike.setdefault(tuple(part.spans[rank] for part in output.parts), []).append(rank)
        sinks = [Sink(ranks[0], [files[rank] for rank in ranks], offset) for ranks in alike.values()]
        for part in output.parts:
            source = self._reader.open(part.source)
            if part.rows > 1 and part.row_bytes <= BLOCK:
                self._by_columns(part, source, sinks)
            else:
                self._by_spans(part, source, sinks)
        digests = {
            rank: sink.digest for ranks, sink in zip(alike.values(), sinks, strict=True) for rank in ranks
        }
        return [digests[rank] for rank in range(len(files))]

    def _check_wanted(self) -> None:
        if self._stop.is_set():
            raise CheckpointError("was not cut to its end: the conversion was stopped")

    def _by_spans(self, part: Part, source: Bytes, sinks: Sequence[Sink]) -> None:
        for row in range(part.rows):
            start = row * part.row_bytes
            for sink in sinks:
                for begin, end in part.spans[sink.rank]:
                    for at, length in _blocks(start + begin, start + end):
                        data = memoryview(self._block)[:length]
                        self._check_wanted()
                        source.read_into(data, at)
                        sink.write(data)

    def _by_columns(self, part: Part, source: Bytes, sinks: Sequence[Sink]) -> None:
        """Read whole rows, once for all ranks, and give each rank its columns of them."""
        unit = math.gcd(8, part.row_bytes, *(edge for rank in part.spans for span in rank for edge in span))
        columns = part.row_bytes // unit
        rows, scratch = _elements(self._block, unit), _elements(self._scratch, unit)
        at_a_time = BLOCK // part.row_bytes
        for first in range(0, part.rows, at_a_time):
            count = min(at_a_time, part.rows - first)
            self._check_wanted()
            source.read_into(memoryview(self._block)[: count * part.row_bytes], first * part.row_bytes)
            block = rows[: count * columns].view(count, columns)
            for sink in sinks:
                spans = [(begin // unit, end // unit) for begin, end in part.spans[sink.rank]]
                width = sum(end - begin for begin, end in spans)
                chosen = scratch[: count * width].view(count, width)
                at = 0
                for begin, end in spans:
                    chosen[:, at : at + end - begin] = block[:, begin:end]
                    at += end - begin
                sink.write(memoryview(self._scratch)[: count * width * unit])


def view_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory; the tensor must outlive them."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B")


def _blocks(begin: int, end: int) -> Iterator[Span]:
    for at in range(begin, end, BLOCK):
        yield at, min(BLOCK, end - at)


def _elements(memory: bytearray, size: int) -> torch.Tensor:
    import torch

    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return torch.frombuffer(memory, dtype=kind)
