# SPDX-License-Identifier: Apache-2.0
"""Read several files at a time, each in its own order, and hand on what is ready first."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import attrs
import torch

from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError, WeightsError
from weights_core.shards import Shard
from weights_core.tensors import nbytes
from weights_core.weightset import Target, in_order
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

        return self._run([job(name) for name in in_order(self.metas, names)])

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill the targets, each file's in the order of its offsets."""

        def job(target: Target) -> Job[Target]:
            def run() -> Target:
                self.read_into(target.name, target.out, target.slices)
                return target

            straight = target.out.device.type == "cpu" and target.out.is_contiguous() and not target.slices
            return Job(self.shard_of(target.name), 0 if straight else nbytes(target.out), run)

        position = {name: index for index, name in enumerate(self.metas)}
        return self._run([job(t) for t in sorted(targets, key=lambda t: position[t.name])])

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
        self.check_unchanged()


class Run(Generic[T]):
    """One pass over some jobs: files go to a pool of threads, results come out as they are ready."""

    def __init__(self, jobs: Sequence[Job[T]], threads: int, window: Window) -> None:
        self._by_shard: dict[Shard, list[Job[T]]] = {}
        for job in jobs:
            self._by_shard.setdefault(job.shard, []).append(job)
        self._due = len(jobs)
        self._threads = threads
        self._window = window
        self._ready: queue.SimpleQueue[tuple[Job[T], T] | None] = queue.SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def results(self) -> Iterator[T]:
        """Yield every job's result as it is ready.

        Raises:
            CheckpointError: a file could not be read, or `stop` was called meanwhile.
        """
        if not self._by_shard:
            return
        self._pool = ThreadPoolExecutor(min(self._threads, len(self._by_shard)), "weights-read")
        try:
            futures = [self._pool.submit(self._read_shard, *item) for item in self._by_shard.items()]
            for future in futures:
                future.add_done_callback(self._done)
            running = len(futures)
            while running:
                ready = self._ready.get()
                if ready is None:
                    running -= 1
                    self._raise_failed(futures)
                    continue
                job, item = ready
                self._due -= 1
                yield item
                self._window.give_back(job.held)
                del ready, item  # the consumer's now; not to be kept while we wait for the next
        finally:
            self.stop()
        if self._due:
            raise CheckpointError("the set was closed while it was read")

    def stop(self) -> None:
        """Let running reads end, cancel the others, and join the threads; idempotent."""
        self._window.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _done(self, _: Future[None]) -> None:
        self._ready.put(None)

    def _read_shard(self, shard: Shard, jobs: Iterable[Job[T]]) -> None:
        for job in jobs:
            if not self._window.take(job.held):
                return
            self._ready.put((job, self._read(job)))

    @staticmethod
    def _read(job: Job[T]) -> T:
        try:
            return job.run()
        except WeightsError:
            raise
        except Exception as exc:
            why = f"could not be read: {type(exc).__name__}: {exc}"
            raise CheckpointError(why, file=job.shard.path) from exc

    @staticmethod
    def _raise_failed(futures: Iterable[Future[None]]) -> None:
        for future in futures:
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                raise error
