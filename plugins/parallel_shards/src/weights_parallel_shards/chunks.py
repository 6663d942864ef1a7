# SPDX-License-Identifier: Apache-2.0
"""What to read in which order: tensors and slices cut into pieces, pieces gathered into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from weights_parallel_shards.tuning import BUFFERS, GAP

if TYPE_CHECKING:
    import torch

    from weights_parallel_shards.storage import Storage

T = TypeVar("T")


@attrs.define(eq=False)
class Item(Generic[T]):
    """One tensor, or a part of one, on its way to memory.

    Attributes:
        name: of the tensor, for errors.
        size: bytes that are delivered.
        held: bytes that count as ours until the consumer has them.
        begin: makes `result` and `address` when reading starts, or does all the reading.
        result: what the consumer gets when all pieces have arrived.
        address: of a contiguous destination, else 0.
        left: pieces that have not arrived.
        chunks: chunks that were not taken up; until the last is, nobody waits for the item's room.
    """

    name: str
    size: int
    held: int = 0
    begin: Callable[[], None] | None = None
    result: T | None = None
    address: int = 0
    left: int = 0
    chunks: int = 0


@attrs.frozen(eq=False)
class Box:
    """Elements of a file that are spread out: `sizes` by `strides` (in elements), and where they go."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    out: torch.Tensor


@attrs.define(eq=False)
class Piece:
    """A range of a file, in bytes, that one item needs: all of it, at byte `at` of it, or a box."""

    item: Item[Any]
    begin: int
    end: int
    at: int = 0
    box: Box | None = None


@attrs.define(eq=False)
class Chunk:
    """What one reader does in one go: a range of one file and the pieces it holds, in order.

    A chunk without a `storage` is an item that does its own reading.
    """

    path: Path
    storage: Storage | None
    begin: int = 0
    end: int = 0
    pieces: list[Piece] = attrs.field(factory=list)
    items: list[Item[Any]] = attrs.field(factory=list)


def span(item: Item[Any], begin: int, size: int, limit: int) -> Iterator[Piece]:
    """Cut contiguous bytes of a file on multiples of `limit`, so that neighbours share no page."""
    position = begin
    while position < begin + size:
        end = min(begin + size, (position // limit + 1) * limit)
        yield Piece(item, position, end, position - begin)
        position = end


def selection(
    shape: Sequence[int], ranges: Sequence[range], width: int
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return where a slice of a tensor lies: its first byte, and its sizes and strides in elements.

    Dimensions of one element are left out and those that follow each other without a gap are one, so
    a contiguous selection has one dimension at most.

    Args:
        shape: of the whole tensor.
        ranges: the indices selected, one range per dimension.
        width: bytes of an element.
    """
    first, stride = 0, 1
    sizes: list[int] = []
    strides: list[int] = []
    for size, chosen in zip(reversed(shape), reversed(ranges), strict=True):
        first += chosen.start * stride
        if len(chosen) != 1:
            if sizes and stride == sizes[-1] * strides[-1]:
                sizes[-1] *= len(chosen)
            else:
                sizes.append(len(chosen))
                strides.append(stride)
        stride *= size
    return first * width, tuple(reversed(sizes)), tuple(reversed(strides))


def boxes(
    item: Item[Any],
    begin: int,
    strides: Sequence[int],
    out: torch.Tensor,
    limit: int,
) -> Iterator[Piece]:
    """Cut a spread-out selection into pieces of up to `limit` bytes, in the order of the file.

    Rows are read together where the gaps between them are small, and one by one where not.

    Args:
        item: whose pieces they are.
        begin: byte of the file where the selection begins.
        strides: between the elements in the file, in elements, one per dimension of `out`.
        out: the destination; none of its dimensions is empty.
        limit: the most bytes of the file that a piece may span.
    """
    width = out.element_size()
    sizes = tuple(out.shape)
    extent = _extent(sizes, strides) * width
    if extent <= limit and not _has_gaps(sizes, strides, width):
        yield Piece(item, begin, begin + extent, box=Box(sizes, tuple(strides), out))
        return
    dim = next(d for d, size in enumerate(sizes) if size > 1)
    row, stride = _extent(sizes[dim + 1 :], strides[dim + 1 :]) * width, strides[dim] * width
    rows = 1
    if row <= limit and stride - row < GAP and not _has_gaps(sizes[dim + 1 :], strides[dim + 1 :], width):
        rows += (limit - row) // stride
    for at in range(0, sizes[dim], rows):
        part = out.narrow(dim, at, min(rows, sizes[dim] - at))
        yield from boxes(item, begin + at * stride, strides, part, limit)


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements from the first to the last of a selection."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _has_gaps(sizes: Sequence[int], strides: Sequence[int], width: int) -> bool:
    return any(
        size > 1 and (strides[d] - _extent(sizes[d + 1 :], strides[d + 1 :])) * width >= GAP
        for d, size in enumerate(sizes)
    )


def gather(storage: Storage, pieces: Iterable[Piece], limit: int, *, windowed: bool) -> Iterator[Chunk]:
    """Put pieces of one file that lie close together into chunks of up to `limit` bytes.

    Pieces that overlap, as two targets for one tensor do, go to different chunks. With `windowed` a
    chunk that begins a large item begins with it: else the end of the item before could not be had
    until there is room for the large one.
    """
    chunk: Chunk | None = None
    for piece in sorted(pieces, key=_place):
        item = piece.item
        if (
            chunk is None
            or not 0 <= piece.begin - chunk.end < GAP
            or piece.end - chunk.begin > limit
            or (piece.begin // limit != chunk.begin // limit and piece.box is None)
            or len(chunk.pieces) >= BUFFERS
            or (windowed and piece.at == 0 and item.held >= limit // 4)
        ):
            if chunk is not None:
                yield chunk
            chunk = Chunk(storage.file.path, storage, piece.begin)
        if not chunk.items or chunk.items[-1] is not item:
            chunk.items.append(item)
            item.chunks += 1
        chunk.end = piece.end
        chunk.pieces.append(piece)
        item.left += 1
    if chunk is not None:
        yield chunk


def _place(piece: Piece) -> tuple[int, int]:
    return piece.begin, piece.end
