# SPDX-License-Identifier: Apache-2.0
"""A reader's own staging memory, and the way of a chunk through it, or past it, to its destinations."""

from __future__ import annotations

import ctypes

import torch

from weights_core.errors import CheckpointError
from weights_core.tensors import empty
from weights_parallel_shards.chunks import Box, Chunk, Piece
from weights_parallel_shards.storage import ReadError, Segments, Way, memory
from weights_parallel_shards.tuning import ALIGNMENT, STRAIGHT, Tuning

_RELEASE = 64 << 10
"""Bytes of a copy from which on it pays to let other threads run meanwhile."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Lane:
    """One reader's staging memory, kept from one pass over a set to the next."""

    def __init__(self, tuning: Tuning) -> None:
        (self._slot,) = slots(empty((tuning.slot_bytes + ALIGNMENT,), torch.uint8), 1)

    def read(self, chunk: Chunk) -> None:
        """Bring a chunk to its destinations: straight where it can, else through staging memory.

        Raises:
            CheckpointError: the bytes cannot be had; names file, tensor and byte.
        """
        storage = chunk.storage
        assert storage is not None
        way = storage.way(chunk.begin, chunk.end)
        segments, staged = scatter(chunk, way, self._slot.data_ptr())
        read(chunk, way, segments)
        for piece, source in staged:
            if piece.box is None:
                begin, address, size = source
                copy(piece.item.address + piece.at + begin - piece.begin, address, size)
            else:
                piece.box.out.copy_(spread(piece.box, source[1], source[2], self._slot))


def slots(ring: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut `count` aligned buffers of equal size out of bytes that may begin anywhere."""
    skip = -ring.data_ptr() % ALIGNMENT
    size = (ring.numel() - skip) // count // ALIGNMENT * ALIGNMENT
    return [ring[skip + n * size : skip + (n + 1) * size] for n in range(count)]


Staged = tuple[int, int, int]
"""Byte of the file, address in staging memory, and number of bytes."""


def read(chunk: Chunk, way: Way, segments: Segments) -> None:
    """Read a chunk into `segments`.

    Raises:
        CheckpointError: the bytes cannot be had; names file, tensor and byte.
    """
    assert chunk.storage is not None
    try:
        chunk.storage.read(way, segments, chunk.begin // way.align * way.align, chunk.end)
    except ReadError as exc:
        piece = next(p for p in chunk.pieces if p.end > exc.offset)
        raise CheckpointError(
            str(exc),
            file=chunk.path,
            tensor=piece.item.name,
            offset=max(exc.offset, piece.begin),
        ) from exc.__cause__


def check_unchanged(chunk: Chunk) -> None:
    """Refuse a chunk that was read from a file which is no longer the one that was opened.

    Raises:
        CheckpointError: it is not; names the first tensor that was read.
    """
    assert chunk.storage is not None
    try:
        chunk.storage.file.check_unchanged()
    except CheckpointError as exc:
        exc.tensor = chunk.pieces[0].item.name
        raise


def scatter(chunk: Chunk, way: Way, address: int) -> tuple[Segments, list[tuple[Piece, Staged]]]:
    """Lay out one read of a chunk: destinations where they are aligned, staging memory between them.

    What is staged lies at an address congruent to its place in the file, modulo the alignment, so
    elements that are aligned in the file are aligned there.

    Args:
        chunk: what to read.
        way: how; its alignment counts for place, length and address alike.
        address: of staging memory, aligned to a page.
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
            piece.item.address
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


def spread(box: Box, address: int, size: int, slot: torch.Tensor) -> torch.Tensor:
    """Return what was staged of a box, at an address in `slot`, as a tensor of its shape and dtype."""
    at = address - slot.data_ptr()
    raw = slot[at : at + size]
    if address % box.out.element_size():
        raw = raw.clone()  # the file has its elements at odd places
    return raw.view(box.out.dtype).as_strided(box.sizes, box.strides)


def integers(out: torch.Tensor) -> torch.Tensor:
    """Return a view of `out` as integers of its width: their copies are of bits, for every dtype."""
    return out.detach().view(_INTEGERS[out.element_size()])
