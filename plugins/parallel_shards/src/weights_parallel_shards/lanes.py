# SPDX-License-Identifier: Apache-2.0
"""A reader's own staging memory, and the way of a chunk through it, or past it, to its destinations."""

from __future__ import annotations

import abc
import collections
import ctypes
import queue
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import torch

from weights_core.errors import CheckpointError
from weights_core.tensors import empty
from weights_parallel_shards.chunks import Chunk, Item, Piece
from weights_parallel_shards.storage import ReadError, Segments, Way, memory
from weights_parallel_shards.tuning import ALIGNMENT, STRAIGHT, Tuning

_RELEASE = 64 << 10
"""Bytes of a copy from which on it pays to let other threads run meanwhile."""

_SUBMISSIONS = 2
"""Submissions of copies under way, so that the device never waits for the next."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mark(Protocol):
    """A point in the work of a device."""

    def synchronize(self) -> None:
        """Wait in this thread until the device has passed it."""
        ...

    def join(self) -> None:
        """Make what the caller submits to the device from now on wait for it."""
        ...


class Channel(Protocol):
    """An order of copies from host memory to a device, beside others."""

    def copy(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Mark:
        """Submit copies, destination and source, and return the point after them.

        The sources must stay as they are until it has passed.
        """
        ...

    def follow(self) -> None:
        """Begin after what the calling thread has submitted to the device."""
        ...


class Device(Protocol):
    """What a lane needs of a device that copies by itself."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Return bytes of host memory that the device can read."""
        ...

    def channel(self) -> Channel:
        """Return a new channel."""
        ...


@attrs.frozen(eq=False)
class Pending:
    """A chunk that lies in staging memory: copies, destination and source, that are still to be submitted."""

    lane: DeviceLane
    slot: int
    items: Sequence[Item[Any]]
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]


class Lane(abc.ABC):
    """One reader's staging memory, kept from one pass over a set to the next."""

    @abc.abstractmethod
    def read(self, chunk: Chunk) -> Pending | None:
        """Bring a chunk to its destinations, or to where the consumer's thread must go on; see `submit`.

        Raises:
            CheckpointError: the bytes cannot be had; names file, tensor and byte.
        """

    def begin(self) -> None:
        """Get ready for a pass; called by the consumer."""
        return

    def cancel(self) -> None:
        """Have `read` wait for nothing any more; called by any thread."""
        return

    def settle(self) -> bool:
        """Wait for the oldest thing under way, if any; called by the consumer, who has nothing to do."""
        return False

    def end(self) -> None:
        """Return when nothing is under way any more; called by the consumer when `read` can't run."""
        return


class HostLane(Lane):
    """Reads straight into host memory where it can, else into one staging buffer."""

    def __init__(self, tuning: Tuning) -> None:
        (self._slot,) = slots(empty((tuning.slot_bytes + ALIGNMENT,), torch.uint8), 1)

    def read(self, chunk: Chunk) -> None:
        """Read and copy; when this returns the bytes are there."""
        for piece, source in fetch(chunk, self._slot, straight=True):
            if piece.item.address:
                copy(piece.item.address + piece.at + (source[0] - piece.begin), source[1], source[2])
            else:
                for out, staged in parts(piece, source, self._slot):
                    out.copy_(staged)


class DeviceLane(Lane):
    """Reads into slots of memory that a device copies from by itself, some chunks behind.

    All readers of a pass share one: whoever is next takes the slot that is free next. Readers never
    call the device: the consumer's thread submits the copies and sees to what is done. Calls from many
    threads wait for each other in the driver and for the interpreter, at a third of the speed.
    """

    def __init__(self, tuning: Tuning, device: Device) -> None:
        self._channel = device.channel()
        count = tuning.readers * tuning.slots
        self._slots = slots(device.host_memory(count * tuning.slot_bytes + ALIGNMENT), count)
        self._under_way: collections.deque[tuple[Mark, list[int]]] = collections.deque()
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def begin(self) -> None:
        """Begin after what the consumer has submitted: it may still use the destinations' memory."""
        self._channel.follow()
        self._free = queue.SimpleQueue()
        for number in range(len(self._slots)):
            self._free.put(number)

    def cancel(self) -> None:
        """Wake a reader that waits for a slot."""
        self._free.put(None)

    def read(self, chunk: Chunk) -> Pending | None:
        """Read into a free slot; None if cancelled."""
        number = self._free.get()
        if number is None:
            return None
        slot = self._slots[number]
        copies = [
            c for piece, source in fetch(chunk, slot, straight=False) for c in parts(piece, source, slot)
        ]
        return Pending(self, number, chunk.items, copies)

    def submit(self, read: Sequence[Pending]) -> None:
        """Submit the copies of chunks that were read; called by the consumer's thread.

        Each submission costs about as much as several copies, so they go together.
        """
        mark = self._channel.copy([copy for one in read for copy in one.copies])
        self._under_way.append((mark, [one.slot for one in read]))
        for one in read:
            for item in one.items:
                item.mark = mark  # in the order of one channel the last counts
        while len(self._under_way) > _SUBMISSIONS:
            self.settle()

    def settle(self) -> bool:
        """Wait for the oldest submission and free its slots; False if none is under way."""
        if not self._under_way:
            return False
        mark, done = self._under_way.popleft()
        mark.synchronize()
        for number in done:
            self._free.put(number)
        return True

    def end(self) -> None:
        """Wait for the device: nobody else knows of its copies."""
        while self.settle():
            pass


def slots(ring: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut `count` aligned buffers of equal size out of bytes that may begin anywhere."""
    skip = -ring.data_ptr() % ALIGNMENT
    size = (ring.numel() - skip) // count // ALIGNMENT * ALIGNMENT
    return [ring[skip + n * size : skip + (n + 1) * size] for n in range(count)]


Staged = tuple[int, int, int]
"""Byte of the file, address in staging memory, and number of bytes."""


def fetch(chunk: Chunk, slot: torch.Tensor, *, straight: bool) -> list[tuple[Piece, Staged]]:
    """Read a chunk and look at the file; return what lies in the staging memory `slot` now.

    With `straight`, what can go straight to host memory goes there.

    Raises:
        CheckpointError: as `Lane.read`.
    """
    storage = chunk.storage
    assert storage is not None
    way = storage.way(chunk.begin, chunk.end)
    segments, staged = scatter(chunk, way, slot.data_ptr(), straight=straight)
    begin = chunk.begin // way.align * way.align
    try:
        storage.read(way, segments, begin, chunk.end)
    except ReadError as exc:
        piece = next(p for p in chunk.pieces if p.end > exc.offset)
        raise CheckpointError(
            str(exc),
            file=storage.file.path,
            tensor=piece.item.name,
            offset=max(exc.offset, piece.begin),
        ) from exc.__cause__
    try:
        storage.file.check_unchanged()
    except CheckpointError as exc:
        exc.tensor = chunk.pieces[0].item.name
        raise
    return staged


def scatter(
    chunk: Chunk, way: Way, address: int, *, straight: bool
) -> tuple[Segments, list[tuple[Piece, Staged]]]:
    """Lay out one read of a chunk: destinations where they are aligned, staging memory between them.

    What is staged lies at an address congruent to its place in the file, modulo the alignment, so
    elements that are aligned in the file are aligned there.

    Args:
        chunk: what to read.
        way: how; its alignment counts for place, length and address alike.
        address: of staging memory, aligned to a page.
        straight: whether host memory may be a destination.
    """
    align, segments, staged = way.align, Segments(), list[tuple[Piece, Staged]]()
    position = chunk.begin // align * align
    free = address  # the next byte of staging memory

    def stage(end: int) -> None:
        nonlocal position, free
        if end > position:
            segments.append((free, end - position))
            free += end - position
            position = end

    def congruent() -> int:
        """Return where the byte at `position` will be staged."""
        nonlocal free
        free += (position - free) % 64
        return free

    base = congruent()
    start = position
    for piece in chunk.pieces:
        to = piece.item.address + piece.at
        low, high = -(-piece.begin // align) * align, piece.end // align * align
        if (
            straight
            and piece.item.address
            and (to - piece.begin) % align == 0
            and high - low >= (1 if align == 1 else STRAIGHT)
        ):
            if low > piece.begin:
                staged.append((piece, (piece.begin, base + piece.begin - start, low - piece.begin)))
            stage(low)
            segments.append((to + low - piece.begin, high - low))
            position = high
            base, start = congruent(), position
            if piece.end > high:
                staged.append((piece, (high, base, piece.end - high)))
        else:
            staged.append((piece, (piece.begin, base + piece.begin - start, piece.end - piece.begin)))
    stage(-(-chunk.end // align) * align)
    return segments, staged


def copy(to: int, source: int, size: int) -> None:
    """Copy bytes between addresses, and let other threads run if there are many."""
    if size < _RELEASE:
        memory(to, size)[:] = memory(source, size)
    else:
        ctypes.memmove(to, source, size)


def parts(piece: Piece, source: Staged, slot: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return destination and staged bytes of a piece as tensors of one shape and dtype."""
    begin, address, size = source
    at = address - slot.data_ptr()
    raw = slot[at : at + size]
    if piece.box is None:
        assert piece.item.out is not None
        first = piece.at + begin - piece.begin
        return [(piece.item.out[first : first + size], raw)]
    out = piece.box.out
    if address % out.element_size():
        raw = raw.clone()  # the file has its elements at odd places
    return [(out, raw.view(out.dtype).as_strided(piece.box.sizes, piece.box.strides))]


def integers(out: torch.Tensor) -> torch.Tensor:
    """Return a view of `out` as integers of its width: their copies are of bits, for every dtype."""
    return out.detach().view(_INTEGERS[out.element_size()])
