# SPDX-License-Identifier: Apache-2.0

import math
import random

import pytest
import torch

from weights_core.files import File
from weights_parallel_shards.chunks import Item, boxes, gather, selection, span
from weights_parallel_shards.lanes import integers, scatter
from weights_parallel_shards.storage import Storage, Way
from weights_parallel_shards.tuning import ALIGNMENT, BUFFERS, GAP


@pytest.fixture
def storage(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    storage = Storage(File(path), "never")
    yield storage
    storage.close()
    storage.file.close()


def strides_of(shape):
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


# Cutting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 1, 999, 1000, 1001])
@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 5432])
def test_a_span_is_cut_on_multiples_of_the_limit_and_is_whole(begin, size):
    pieces = list(span(Item("t", size), begin, size, 1000))
    assert [p.begin for p in pieces] == [begin, *(p.end for p in pieces[:-1])]
    assert pieces[-1].end == begin + size
    assert all(p.begin // 1000 == (p.end - 1) // 1000 for p in pieces)
    assert [p.at for p in pieces] == [p.begin - begin for p in pieces]


@pytest.mark.parametrize("seed", range(60))
def test_a_selection_is_where_torch_has_it(seed):
    chance = random.Random(seed)
    shape = [chance.randint(1, 6) for _ in range(chance.randint(0, 4))]
    ranges = []
    for size in shape:
        begin = chance.randrange(size)
        ranges.append(range(begin, chance.randint(begin + 1, size)) if chance.random() < 0.6 else range(size))
    whole = torch.arange(math.prod(shape)).view(shape)
    part = whole[tuple(slice(r.start, r.stop) for r in ranges)]
    first, sizes, strides = selection(shape, ranges, 8)
    assert torch.equal(torch.as_strided(whole.reshape(-1), sizes, strides, first // 8), part.reshape(sizes))
    contiguous = strides in ((), (1,))
    flat = part.reshape(-1)
    assert contiguous == (flat.numel() < 2 or bool((flat.diff() == 1).all()))


@pytest.mark.parametrize("seed", range(40))
def test_boxes_hold_every_element_once_within_the_limit_and_read_over_no_large_gap(seed):
    chance = random.Random(seed)
    shape = [chance.choice([1, 3, 16, 40, 20000]) for _ in range(chance.randint(1, 3))]
    while math.prod(shape) > 2_000_000:
        shape[shape.index(max(shape))] //= 10
    begins = [chance.randrange(size) for size in shape]
    ends = [chance.randint(begin + 1, size) for begin, size in zip(begins, shape, strict=True)]
    cut = tuple(slice(b, e) for b, e in zip(begins, ends, strict=True))
    file = torch.randint(0, 1 << 30, shape, dtype=torch.int32)
    out = torch.full([e - b for b, e in zip(begins, ends, strict=True)], -1, dtype=torch.int32)
    strides = strides_of(shape)
    first = 4 * sum(b * s for b, s in zip(begins, strides, strict=True))
    limit = chance.choice([512, 65536, 1 << 20])
    item = Item("t", 0)
    raw = file.reshape(-1).view(torch.uint8)
    for piece in boxes(item, first, strides, integers(out), limit):
        assert 0 < piece.end - piece.begin <= limit
        assert bool((piece.box.out == -1).all())
        staged = raw[piece.begin : piece.end].clone().view(torch.int32)
        piece.box.out.copy_(staged.as_strided(piece.box.sizes, piece.box.strides))
    assert torch.equal(out, file[cut])


def test_rows_far_apart_are_read_one_by_one_and_rows_close_together_in_one_go():
    far, close = GAP // 4 + 100, 200
    for width, count in ((far, 50), (close, 1)):
        out = torch.zeros(50, 100, dtype=torch.int32)
        pieces = list(boxes(Item("t", 0), 0, [width, 1], out, 1 << 22))
        assert len(pieces) == count
    assert sum(p.end - p.begin for p in pieces) < 50 * 4 * close


# Gathering --------------------------------------------------------------------------------------


def small(count, size=100):
    return [Item(f"t{i}", size, size) for i in range(count)]


def test_small_neighbours_are_one_chunk_and_a_chunk_has_a_most(storage):
    items = small(2 * BUFFERS + 1)
    pieces = [p for i, item in enumerate(items) for p in span(item, 8 + 100 * i, 100, 1 << 20)]
    chunks = list(gather(storage, pieces, 1 << 20, windowed=True))
    assert [len(chunk.pieces) for chunk in chunks] == [BUFFERS, BUFFERS, 1]
    assert all(item.left == item.chunks == 1 for item in items)


def test_pieces_far_apart_or_over_each_other_are_chunks_of_their_own(storage):
    a, b, c = small(3)
    pieces = [*span(a, 0, 100, 1 << 20), *span(b, 100 + GAP, 100, 1 << 20), *span(c, 0, 100, 1 << 20)]
    chunks = list(gather(storage, pieces, 1 << 20, windowed=False))
    assert sorted((chunk.begin, chunk.end) for chunk in chunks) == [
        (0, 100),
        (0, 100),
        (GAP + 100, GAP + 200),
    ]


def test_a_chunk_of_a_stream_that_begins_a_large_tensor_begins_with_it(storage):
    first, large = Item("a", 1500, 1500), Item("b", 3000, 3000)
    pieces = [*span(first, 0, 1500, 1000), *span(large, 1500, 3000, 1000)]
    streamed = list(gather(storage, pieces, 1000, windowed=True))
    assert [chunk.begin for chunk in streamed] == [0, 1000, 1500, 2000, 3000, 4000]
    filled = list(gather(storage, pieces, 1000, windowed=False))
    assert [chunk.begin for chunk in filled] == [0, 1000, 2000, 3000, 4000]


# Laying out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [1, ALIGNMENT])
@pytest.mark.parametrize("seed", range(40))
def test_one_read_of_a_chunk_brings_every_byte_to_its_place(storage, seed, align):
    chance = random.Random(seed)
    file = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    memory = torch.zeros(3 << 20, dtype=torch.uint8)
    page = -memory.data_ptr() % ALIGNMENT
    slot = memory[page : page + (3 << 19)]
    pieces, wanted = [], []
    position, free = chance.randrange(10_000), (3 << 19) + page
    while position < 600_000 and len(pieces) < 40:
        size = chance.choice([1, 7, 100, 4096, 70_000, 150_000])
        item = Item(f"t{position}", size)
        shift = (position - (memory.data_ptr() + free)) % ALIGNMENT
        free += shift if chance.random() < 0.7 else chance.randrange(64)
        item.address = memory.data_ptr() + free
        wanted.append((item.address, position, size))
        free += size
        pieces += span(item, position, size, 1 << 20)
        position += size + chance.choice([0, 0, 5, 3000])
    (chunk,) = gather(storage, pieces, 1 << 20, windowed=False)
    segments, staged = scatter(chunk, Way(0, align), slot.data_ptr())
    base = memory.data_ptr()
    begin = at = chunk.begin // align * align
    for address, size in segments:
        assert address % align == size % align == 0
        assert base <= address
        memory[address - base : address - base + size] = file[at : at + size]
        at += size
    assert chunk.end <= at <= chunk.end + align
    assert len(segments) <= 1024
    for piece, (byte, address, size) in staged:
        assert slot.data_ptr() <= address <= slot.data_ptr() + slot.numel() - size
        assert address % 64 == byte % 64
        to = piece.item.address + piece.at + byte - piece.begin - base
        memory[to : to + size] = memory[address - base : address - base + size].clone()
    for address, byte, size in wanted:
        assert torch.equal(memory[address - base : address - base + size], file[byte : byte + size])
    if align == 1:
        assert staged == []
    assert begin <= chunk.begin
