# SPDX-License-Identifier: Apache-2.0
"""One pass over a set: readers take chunk after chunk, results come out as they are complete."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, cast

from weights_core.errors import CheckpointError, WeightsError
from weights_parallel_shards.chunks import Chunk, Item
from weights_parallel_shards.lanes import Lane, check_unchanged
from weights_parallel_shards.storage import Storage
from weights_parallel_shards.window import Window

T = TypeVar("T")


class Run(Generic[T]):
    """One pass: as many threads as lanes take chunks in order, as long as what they begin has room.

    The threads are daemons: one that waits for a consumer that never comes back must not keep the
    interpreter from exiting. In a forked child they don't exist, and nothing here waits for them.
    """

    def __init__(
        self,
        items: Sequence[Item[T]],
        chunks: Sequence[Chunk],
        lanes: list[Lane],
        idle: list[Lane],
        window: Window,
        count: Callable[[int], None],
    ) -> None:
        """Prepare.

        Args:
            items: everything that is to be had.
            chunks: what to read, in order.
            lanes: one per reader; they go to `idle` in the end.
            idle: where lanes go.
            window: what items that hold memory need room in.
            count: told of the bytes of each result.
        """
        self._due = len(items)
        self._nothing_to_read = [item for item in items if not item.size]
        self._chunks = iter([c for c in chunks if c.pieces or c.items[0].size])
        self._lanes, self._idle = lanes, idle
        self._window = window
        self._count = count
        self._kept = 0
        self._stopped = False
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._ready: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"weights-read-{number}", daemon=True)
            for number, lane in enumerate(lanes)
        ]

    def results(self, *, inline: bool) -> Iterator[T]:
        """Yield every item's result as it is complete; with `inline` all reading is done by the caller.

        Raises:
            CheckpointError: a file could not be read, `stop` was called meanwhile, or this process
                is a fork of the one that reads.
        """
        try:
            for item in self._nothing_to_read:
                if item.begin is not None:
                    item.begin()
                yield self._hand_over(item)
            for batch in self._read_here() if inline else self._batches():
                for item in batch:
                    yield self._hand_over(item)
                    if item.held:
                        self._window.give_back(item.held)
        finally:
            self.stop()
        if self._due:
            raise CheckpointError("the set was closed while it was read")

    def stop(self) -> None:
        """Let running reads end, begin no others, and join the threads; idempotent."""
        if os.getpid() != self._pid:
            return
        self._cancel()
        if threading.current_thread() in self._threads:
            return  # the garbage collector runs in a reader, which can't wait for itself
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._idle += self._lanes
        self._lanes = []

    def _hand_over(self, item: Item[T]) -> T:
        result, item.result = item.result, None  # the consumer's now, not to be kept here
        self._due -= 1
        self._count(item.size)
        return cast(T, result)

    def _read_here(self) -> Iterator[list[Item[T]]]:
        (lane,) = self._lanes
        for chunk in self._chunks:
            if self._stopped:
                return
            with _named(chunk):
                self._begin(chunk)
                self._read(chunk, lane)
            yield self._complete([chunk])

    def _batches(self) -> Iterator[list[Item[T]]]:
        for thread in self._threads:
            thread.start()
        working = len(self._threads)
        while working:
            if os.getpid() != self._pid:
                raise CheckpointError("is being read by the process that this one was forked from")
            reads = [self._ready.get()]
            while not self._ready.empty():
                reads.append(self._ready.get())
            for failed in reads:
                if isinstance(failed, Exception):
                    try:
                        raise failed
                    finally:
                        del failed, reads  # its traceback leads here
            working -= reads.count(None)
            yield self._complete([read for read in reads if isinstance(read, Chunk)])

    def _cancel(self) -> None:
        self._stopped = True
        self._window.close()

    def _work(self, lane: Lane) -> None:
        try:
            while (chunk := self._next()) is not None:
                with _named(chunk):
                    self._read(chunk, lane)
                self._ready.put(chunk)
        except Exception as exc:  # noqa: BLE001 - raised in the consumer's thread
            self._cancel()
            self._ready.put(exc)
        finally:
            self._ready.put(None)

    def _next(self) -> Chunk | None:
        """Return the next chunk when what begins in it has room; None when there is no more to do."""
        with self._turn:
            chunk = None if self._stopped else next(self._chunks, None)
            if chunk is None:
                return None
            held = sum(item.held for item in chunk.items if item.begin is not None)
            if held and not self._window.take(held, self._kept):
                return None
            with _named(chunk):
                self._begin(chunk)
            return chunk

    def _begin(self, chunk: Chunk) -> None:
        if chunk.storage is None:
            return
        for item in chunk.items:
            if item.begin is not None:
                item.begin()
                item.begin = None
                self._kept += item.held
            item.chunks -= 1
            if not item.chunks:
                self._kept -= item.held

    def _read(self, chunk: Chunk, lane: Lane) -> None:
        if chunk.storage is not None:
            lane.read(chunk)
            return
        (item,) = chunk.items
        assert item.begin is not None
        item.begin()

    def _complete(self, chunks: Sequence[Chunk]) -> list[Item[T]]:
        """Look at the files once more; return the items that are complete with these chunks."""
        looked_at = set[Storage]()
        complete: list[Item[T]] = []
        for chunk in chunks:
            if chunk.storage is None:
                complete += chunk.items
            elif chunk.storage not in looked_at:
                looked_at.add(chunk.storage)
                check_unchanged(chunk)
            for piece in chunk.pieces:
                piece.item.left -= 1
                if not piece.item.left:
                    complete.append(piece.item)
        return complete


@contextlib.contextmanager
def _named(chunk: Chunk) -> Iterator[None]:
    """Say which file was read when something failed that knows no file."""
    try:
        yield
    except (WeightsError, ValueError):  # ValueError: the consumer's destination is wrong
        raise
    except Exception as exc:
        raise CheckpointError(f"could not be read: {type(exc).__name__}: {exc}", file=chunk.path) from exc
