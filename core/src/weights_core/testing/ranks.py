# SPDX-License-Identifier: Apache-2.0
"""A group of ranks as threads of one process, with the `gather` that engines need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class Group:
    """`size` ranks; `run` calls a function once per rank, `gather(rank)` is that rank's gather."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[object] = [None] * size
        self._barrier = threading.Barrier(size)

    def gather(self, rank: int) -> Callable[[object, float], Sequence[object]]:
        """Return a function that swaps a value with all other ranks, with a time-out in seconds."""

        def gather(value: object, timeout: float) -> Sequence[object]:
            self._values[rank] = value
            try:
                self._barrier.wait(timeout)
                gathered = list(self._values)
                self._barrier.wait(timeout)
            except threading.BrokenBarrierError as exc:
                raise TimeoutError(f"a rank stayed away for {timeout} s") from exc
            return gathered

        return gather

    def run(self, rank_main: Callable[[int], T]) -> list[Future[T]]:
        """Call `rank_main(rank)` on every rank at once; return the finished futures by rank."""
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(rank_main, rank) for rank in range(self.size)]
            wait(futures)
        return futures
