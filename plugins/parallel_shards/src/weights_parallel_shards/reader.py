# SPDX-License-Identifier: Apache-2.0
"""Read several files at a time, each in its own order, and hand on what is ready first."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import attrs
import torch

from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, WeightsError
from weights_core.shards import Shard
from weights_core.tensors import nbytes
from weights_core.weightset import Target
from weights_parallel_shards.window import Window

T = TypeVar("T")


@attrs.frozen(eq=False)
class Job(Generic[T]):
    """One tensor to read, and what to call for it.

    `held` bytes of the result are memory of ours until the consumer has it.
    """

    shard: Shard
    held: int
    run: Callable[[], T]


class ParallelSet(ShardSet):
    """A checkpoint's files as one set, `threads` of them read at a time.

    `fill` reads straight into the targets. `stream` reads ahead of the consumer by at most
    `max_host_bytes`; what it has yielded is the consumer's and is not counted.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        notes: tuple[str, ...] = (),
        threads: int,
        max_host_bytes: int,
    ) -> None:
        super().__init__(shards, provider="parallel_shards", notes=notes)
        self._threads = threads
        self._max_host_bytes = max_host_bytes
        self._runs: list[Run[Any]] = []

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors as they come in, each file in its own order."""

        def job(name: str) -> Job[tuple[str, torch.Tensor]]:
            return Job(self.shard_of(name), self.meta(name).nbytes, lambda: (name, self.read(name)))

        return self._run([job(name) for name in self.in_order(names)])

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill the targets, each file's in the order of its offsets."""

        def job(target: Target) -> Job[Target]:
            def run() -> Target:
                self.read_into(target.name, target.out, target.slices)
                return target

            straight = target.out.device.type == "cpu" and target.out.is_contiguous() and not target.slices
            return Job(self.shard_of(target.name), 0 if straight else nbytes(target.out), run)

        return self._run([job(target) for target in self.sorted(targets)])

    def close(self) -> None:
        """Stop what is still being read, join the threads and close the files."""
        for run in list(self._runs):
            run.stop()
        super().close()

    def _run(self, jobs: list[Job[T]]) -> Iterator[T]:
        run = Run(jobs, self._threads, Window(self._max_host_bytes))
        self._runs.append(run)
        try:
            yield from run.results()
        finally:
            self._runs.remove(run)


@attrs.frozen
class _Result(Generic[T]):
    """What a reader hands over: a job's value, or the error that ended the reading."""

    held: int
    value: T


class Run(Generic[T]):
    """One pass over some jobs: threads take one file after the other, results come out as they are ready.

    The threads are daemons: one that waits for a consumer that never comes back must not keep the
    interpreter from exiting.
    """

    def __init__(self, jobs: Sequence[Job[T]], threads: int, window: Window) -> None:
        by_shard: dict[Shard, list[Job[T]]] = {}
        for job in jobs:
            by_shard.setdefault(job.shard, []).append(job)
        self._due = len(jobs)
        self._window = window
        self._files = iter(list(by_shard.values()))
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[_Result[T] | Exception | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"weights-read-{number}", daemon=True)
            for number in range(min(threads, len(by_shard)))
        ]

    def results(self) -> Iterator[T]:
        """Yield every job's result as it is ready.

        Raises:
            CheckpointError: a file could not be read, or `stop` was called meanwhile.
        """
        for thread in self._threads:
            thread.start()
        working, ready = len(self._threads), None
        try:
            while working:
                ready = self._ready.get()
                if ready is None:
                    working -= 1
                elif isinstance(ready, Exception):
                    raise ready
                else:
                    self._due -= 1
                    yield ready.value
                    self._window.give_back(ready.held)
                ready = None  # the consumer's now: not to be kept while we wait for the next
        finally:
            del ready  # nor an error, whose traceback leads here
            self.stop()
        if self._due:
            raise CheckpointError("the set was closed while it was read")

    def stop(self) -> None:
        """Let running reads end, begin no others, and join the threads; idempotent."""
        self._window.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self) -> None:
        try:
            while jobs := self._next_file():
                for job in jobs:
                    if not self._window.take(job.held):
                        return
                    self._ready.put(_Result(job.held, self._read(job)))
        except Exception as exc:  # noqa: BLE001 - raised in the consumer's thread
            self._ready.put(exc)
        finally:
            self._ready.put(None)

    def _next_file(self) -> list[Job[T]] | None:
        with self._lock:
            return next(self._files, None)

    @staticmethod
    def _read(job: Job[T]) -> T:
        try:
            return job.run()
        except (WeightsError, ValueError):  # ValueError: the consumer's destination is wrong
            raise
        except Exception as exc:
            why = f"could not be read: {type(exc).__name__}: {exc}"
            raise CheckpointError(why, file=job.shard.path) from exc
