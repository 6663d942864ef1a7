# SPDX-License-Identifier: Apache-2.0
"""Read several files at a time, each in its own order, and hand on what is ready first."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import attrs
import torch
from tqdm import tqdm

from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError
from weights_core.shards import Shard
from weights_core.weightset import Target
from weights_parallel_shards.window import Window

T = TypeVar("T")


@attrs.frozen(eq=False)
class Job(Generic[T]):
    """One tensor to read: what to call, and how many bytes it holds until it is consumed."""

    shard: Shard
    nbytes: int
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
        progress: bool,
    ) -> None:
        super().__init__(shards, provider="parallel_shards", notes=notes)
        self._threads = threads
        self._max_host_bytes = max_host_bytes
        self._progress = progress
        self._runs: list[Run[Any]] = []

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors as they come in, each file in its own order."""

        def job(name: str, nbytes: int) -> Job[tuple[str, torch.Tensor]]:
            return Job(self.shard_of(name), nbytes, lambda: (name, self.read(name)))

        wanted = self.metas.keys() if names is None else set(names)
        return self._run([job(m.name, m.nbytes) for m in self.metas.values() if m.name in wanted])

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill the targets, each file's in the order of its offsets."""

        def job(target: Target) -> Job[Target]:
            def run() -> Target:
                self.read_into(target.name, target.out, target.slices)
                return target

            return Job(self.shard_of(target.name), 0, run)

        position = {name: index for index, name in enumerate(self.metas)}
        return self._run([job(t) for t in sorted(targets, key=lambda t: position[t.name])])

    def close(self) -> None:
        """Stop what is still being read, join the threads and close the files."""
        for run in self._runs:
            run.stop()
        super().close()

    def _run(self, jobs: list[Job[T]]) -> Iterator[T]:
        run = Run(jobs, self._threads, Window(self._max_host_bytes))
        self._runs.append(run)
        total = sum(self.metas[name].nbytes for name in self.metas)
        # disable=None hides the bar where standard error is no terminal
        bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="weights", disable=None if self._progress else True
        )
        with bar:
            before = self.bytes_read
            for item in run:
                bar.update(self.bytes_read - before)
                before = self.bytes_read
                yield item
        self.check_unchanged()


class Run(Generic[T]):
    """One pass over some jobs: files go to a pool of threads, results come out as they are ready."""

    def __init__(self, jobs: Sequence[Job[T]], threads: int, window: Window) -> None:
        self._by_shard: dict[Shard, list[Job[T]]] = {}
        for job in jobs:
            self._by_shard.setdefault(job.shard, []).append(job)
        self._threads = threads
        self._window = window
        self._ready: queue.SimpleQueue[tuple[Job[T], T] | None] = queue.SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def __iter__(self) -> Iterator[T]:
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
                yield item
                self._window.give_back(job.nbytes)
        finally:
            self.stop()

    def stop(self) -> None:
        """Let running reads end, cancel the others, and join the threads; idempotent."""
        self._window.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _done(self, _: Future[None]) -> None:
        self._ready.put(None)

    def _read_shard(self, shard: Shard, jobs: Iterable[Job[T]]) -> None:
        for job in jobs:
            if not self._window.take(job.nbytes):
                return
            try:
                item = job.run()
            except CheckpointError:
                raise
            except Exception as exc:
                raise CheckpointError(
                    f"could not be read: {type(exc).__name__}: {exc}", file=shard.path
                ) from exc
            self._ready.put((job, item))

    @staticmethod
    def _raise_failed(futures: Iterable[Future[None]]) -> None:
        for future in futures:
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                raise error
