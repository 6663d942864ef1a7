# SPDX-License-Identifier: Apache-2.0
"""Bring in the pages of mapped files by several threads, ahead of whoever they are lent to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from weights_core.errors import CheckpointError
from weights_core.shards import SafetensorsShard
from weights_core.weightset import Slices

LARGEST, SMALLEST = 128 << 20, 8 << 20
"""Bytes of a file that one thread brings in. Few large pieces: the kernel reads ahead in each."""
STEP = 16 << 20
"""Bytes after which a thread looks whether to go on."""
GAP = 1 << 20
"""Bytes between two wanted ranges up to which they are read as one."""


@attrs.define(eq=False)
class Piece:
    """Bytes of a file, from `begin` to `end`; `ready` when they were read, or nobody will."""

    shard: SafetensorsShard
    begin: int
    end: int
    ready: threading.Event = attrs.field(factory=threading.Event)


class ReadAhead:
    """Has threads read pieces of files in their order; `wait` for a tensor's before it is lent.

    Nothing is copied. What cannot be read is no error here: whoever lends the tensor meets that again.
    """

    def __init__(self, parts: Iterable[tuple[str, SafetensorsShard, range]], threads: int) -> None:
        """Prepare to bring in `parts`: names, files, and bytes of these, by file and offset."""
        known = list(parts)
        share = sum(len(extent) for _, _, extent in known) // threads
        self._pieces, self._last = _cut(known, max(SMALLEST, min(LARGEST, share)))
        self._stopped = False
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._most = threads
        self._threads: list[threading.Thread] = []

    def start(self, is_cached: Callable[[SafetensorsShard, int], bool]) -> None:
        """Begin, unless all is in the page cache, as far as a few bytes of each piece tell."""
        for piece in self._pieces:
            if all(is_cached(piece.shard, at) for at in (piece.begin, piece.end - 1)):
                piece.ready.set()
        due = [piece for piece in self._pieces if not piece.ready.is_set()]
        self._due = iter(due)
        self._threads = [
            threading.Thread(target=self._work, name=f"weights-map-{number}", daemon=True)
            for number in range(min(self._most, len(due)))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, name: str) -> None:
        """Wait until the tensor's bytes were read.

        Raises:
            CheckpointError: this process is a fork of the one that reads.
        """
        last = self._last.get(name)
        if last is None or self._pieces[last].ready.is_set():
            return
        if os.getpid() != self._pid:
            raise CheckpointError("is being read by the process that this one was forked from")
        self._pieces[last].ready.wait()

    def stop(self) -> None:
        """Begin no more, and join the threads; idempotent."""
        if os.getpid() != self._pid:
            return
        self._stopped = True
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        for piece in self._pieces:
            piece.ready.set()

    def _work(self) -> None:
        while True:
            with self._turn:
                piece = next(self._due, None)
            if piece is None:
                return
            try:
                for begin in range(piece.begin, piece.end, STEP):
                    if self._stopped:
                        return
                    piece.shard.bring(range(begin, min(begin + STEP, piece.end)))
            finally:
                piece.ready.set()


def extents(
    names: Iterable[str], shard_of: Callable[[str], object], slices: Mapping[str, Slices | None]
) -> Iterable[tuple[str, SafetensorsShard, range]]:
    """Yield where the parts lie that can be mapped."""
    for name in names:
        shard = shard_of(name)
        extent = shard.extent(name, slices.get(name)) if isinstance(shard, SafetensorsShard) else None
        if extent is not None:
            assert isinstance(shard, SafetensorsShard)
            yield name, shard, extent


def _cut(
    parts: Sequence[tuple[str, SafetensorsShard, range]], most: int
) -> tuple[list[Piece], dict[str, int]]:
    """Join what lies close together, up to `most` bytes; return also each name's last piece."""
    pieces: list[Piece] = []
    last: dict[str, int] = {}
    for name, shard, extent in parts:
        begin = extent.start
        while begin < extent.stop:
            piece = pieces[-1] if pieces else None
            if (
                piece is None
                or piece.shard is not shard
                or not 0 <= begin - piece.end <= GAP
                or begin - piece.begin >= most
            ):
                piece = Piece(shard, begin, begin)
                pieces.append(piece)
            piece.end = begin = min(extent.stop, piece.begin + most)
        last[name] = len(pieces) - 1
    return pieces, last
