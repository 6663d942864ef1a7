# SPDX-License-Identifier: Apache-2.0
"""One pass to a device that copies by itself: read into a ring of pinned memory, copy, and again."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, cast

import attrs
import torch

from weights_core.errors import CheckpointError
from weights_parallel_shards.aio import Reads
from weights_parallel_shards.chunks import Chunk, Item
from weights_parallel_shards.lanes import check_unchanged, read, slots, spread
from weights_parallel_shards.storage import Storage, Way
from weights_parallel_shards.tuning import ALIGNMENT, Tuning

T = TypeVar("T")

_TOGETHER = 2
"""Chunks whose slots are freed together: to mark a point costs about as much as a copy."""


class Mark(Protocol):
    """A point in the work of a channel."""

    def query(self) -> bool:
        """Return whether the channel has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait in this thread until the channel has passed it."""
        ...


class Channel(Protocol):
    """Copies from staging memory to a device, in the order they are submitted."""

    def staging(self, nbytes: int) -> torch.Tensor:
        """Return bytes of host memory to copy from.

        Raises:
            LoadError: the system refuses.
        """
        ...

    def copy_bytes(self, to: int, source: int, size: int) -> None:
        """Submit a copy between addresses; staging memory must stay as it is until it is done."""
        ...

    def copy(self, out: torch.Tensor, staged: torch.Tensor) -> None:
        """Submit a copy of what is spread out, in staging memory or in `out`."""
        ...

    def mark(self) -> Mark:
        """Return the point after all that was submitted."""
        ...

    def follow(self) -> None:
        """Begin after what the calling thread has submitted to the device."""
        ...

    def join(self) -> None:
        """Make what the caller submits to the device from now on wait for what is submitted here."""
        ...


class Ring:
    """Staging memory of a channel, as much as was needed so far; kept from one pass to the next."""

    def __init__(self, channel: Channel, tuning: Tuning) -> None:
        self.channel = channel
        self.readers = tuning.readers
        self.slots: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self._tuning = tuning

    def grow(self, chunks: int) -> None:
        """Have a slot for each of so many chunks, up to what the tuning allows."""
        missing = min(self._tuning.slots, chunks) - len(self.slots)
        if missing > 0:
            ring = self.channel.staging(missing * self._tuning.slot_bytes + ALIGNMENT)
            self.slots += slots(ring, missing)
            self.addresses = [slot.data_ptr() for slot in self.slots]


@attrs.frozen(eq=False)
class _Reading:
    """A chunk that is being read: where to, from where in the file, and how."""

    chunk: Chunk
    way: Way
    address: int
    begin: int


class Transfer(Generic[T]):
    """One pass. Everything happens in the consumer's thread, but the reading: see `aio`.

    The ring has more slots than are read into at a time, for those that the device copies from. What was
    freed last is used next: it is still in the processor's cache.
    """

    def __init__(
        self, items: Sequence[Item[T]], chunks: Sequence[Chunk], ring: Ring, count: Callable[[int], None]
    ) -> None:
        """Prepare.

        Args:
            items: everything that is to be had.
            chunks: what to read, in order.
            ring: used by nobody else until this pass has ended.
            count: told of the bytes of each result.
        """
        self._due = len(items)
        self._nothing_to_read = [item for item in items if not item.size]
        self._chunks = iter(chunks)
        self._left = collections.Counter(_storage(chunk) for chunk in chunks)
        self._ring, self._channel = ring, ring.channel
        self._count = count
        self._reading: dict[int, _Reading] = {}
        self._copying: collections.deque[tuple[Mark, list[int]]] = collections.deque()
        self._free: list[int] = []
        self._stopped = False
        self._pid = os.getpid()
        self._turn = threading.RLock()

    def results(self) -> Iterator[T]:
        """Yield every item's result; what the consumer submits to the device next waits for its bytes.

        Raises:
            CheckpointError: a file could not be read, `stop` was called meanwhile, or this process
                is a fork of the one that reads.
        """
        try:
            with self._turn:
                self._ring.grow(self._left.total())
                self._free = list(range(len(self._ring.slots)))
                self._reads = Reads(len(self._free))
                self._channel.follow()
            yield from self._hand_over(self._nothing_to_read)
            while self._due and not self._stopped:
                if os.getpid() != self._pid:
                    raise CheckpointError("is being read by the process that this one was forked from")
                with self._turn:
                    complete = self._step()
                yield from self._hand_over(complete)
        finally:
            self.stop()
        if self._due:
            raise CheckpointError("the set was closed while it was read")

    def stop(self) -> None:
        """Begin nothing more, and return when nothing is under way; idempotent."""
        if os.getpid() != self._pid:
            return
        self._stopped = True
        with self._turn:
            if self._reading:
                self._reads.drain()
                self._reading.clear()
            while self._copying:
                self._copying.popleft()[0].synchronize()
            for storage in self._left:
                storage.close_copies()

    def _hand_over(self, items: Sequence[Item[T]]) -> Iterator[T]:
        for item in items:
            result, item.result = item.result, None  # the consumer's now, not to be kept here
            self._due -= 1
            self._count(item.size)
            yield cast(T, result)

    def _step(self) -> list[Item[T]]:
        """Keep the readers and the device busy; wait if there was nothing to do. Return what is complete."""
        if self._stopped:
            return []
        while self._copying and self._copying[0][0].query():
            self._free += self._copying.popleft()[1]
        self._begin()
        done = self._reads.done()
        if done:
            return self._copy(done)
        if self._reading and (self._free or not self._copying):
            self._reads.wait()
        elif self._copying:
            self._copying[0][0].synchronize()
        return []

    def _begin(self) -> None:
        while self._free and (chunk := next(self._chunks, None)) is not None:
            storage = _storage(chunk)
            way = storage.way(chunk.begin, chunk.end)
            begin = chunk.begin // way.align * way.align
            end = -(-chunk.end // way.align) * way.align
            number = self._free.pop()
            address = self._ring.addresses[number]
            address += (begin - address) % 64  # so elements that are aligned in the file are aligned there
            self._reading[number] = _Reading(chunk, way, address, begin)
            descriptor = storage.descriptor(way.fd, self._ring.readers)
            self._reads.submit(number, descriptor, address, end - begin, begin)

    def _copy(self, done: Sequence[tuple[int, int]]) -> list[Item[T]]:
        """Submit the copies of what was read; return the items that are complete with it."""
        complete: list[Item[T]] = []
        reads = [(number, self._reading.pop(number), got) for number, got in done]
        for _, reading, got in reads:
            self._check(reading, got)
        for chunk in {reading.chunk.storage: reading.chunk for _, reading, _ in reads}.values():
            check_unchanged(chunk)
        for first in range(0, len(reads), _TOGETHER):
            together = reads[first : first + _TOGETHER]
            try:
                for number, reading, _ in together:
                    self._submit(number, reading)
            finally:  # what was submitted before one failed is under way
                self._copying.append((self._channel.mark(), [number for number, _, _ in together]))
            for _, reading, _ in together:
                for piece in reading.chunk.pieces:
                    piece.item.left -= 1
                    if not piece.item.left:
                        complete.append(piece.item)
        if complete:
            self._channel.join()
        return complete

    def _submit(self, number: int, reading: _Reading) -> None:
        for piece in reading.chunk.pieces:
            source, size = reading.address + piece.begin - reading.begin, piece.end - piece.begin
            if piece.box is None:
                self._channel.copy_bytes(piece.item.address + piece.at, source, size)
            else:
                staged = spread(piece.box, source, size, self._ring.slots[number])
                self._channel.copy(piece.box.out, staged)

    def _check(self, reading: _Reading, got: int) -> None:
        """Read again, in the plain way that knows all that can go wrong, what did not come in at once."""
        chunk, way, storage = reading.chunk, reading.way, _storage(reading.chunk)
        if got < chunk.end - reading.begin:
            read(chunk, way, [(reading.address, -(-chunk.end // way.align) * way.align - reading.begin)])
        else:
            storage.forget(way, reading.begin, chunk.end)
        self._left[storage] -= 1
        if not self._left[storage]:
            storage.close_copies()


def _storage(chunk: Chunk) -> Storage:
    assert chunk.storage is not None
    return chunk.storage
