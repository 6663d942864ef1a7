# SPDX-License-Identifier: Apache-2.0
"""Several tensors at work at a time, and what is done recorded beside the writing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from weights_presharded.journal import Journal
from weights_presharded.outputs import Output
from weights_presharded.rankfiles import OpenFiles

COMMIT = 1 << 30
"""Bytes written between two records of what is done: at most about so many are written twice."""


class Committer:
    """Syncs what was written and then records it, beside the writing."""

    def __init__(self, journal: Journal, files: OpenFiles) -> None:
        self._journal = journal
        self._files = files
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights-sync")
        self._running: Future[None] | None = None
        self._due: dict[str, list[str]] = {}
        self._bytes = 0
        self._file = ""

    def done(self, name: str, digests: list[str], nbytes: int, file: str) -> None:
        """Note a tensor that is written; now and then have all that are be recorded.

        Tensors come in the order of the files, so nothing is written any more to those before `file`.
        """
        self._due[name] = digests
        self._bytes += nbytes
        self._file = file
        if self._bytes >= COMMIT:
            self._commit()

    def finish(self) -> None:
        """Have everything recorded."""
        self._commit()
        self._wait()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(wait=True)

    def _commit(self) -> None:
        self._wait()
        due, self._due, self._bytes = self._due, {}, 0
        self._running = self._pool.submit(self._record, due, self._file)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _record(self, due: Mapping[str, list[str]], file: str) -> None:
        self._files.sync()
        if due:
            self._journal.add(due)
        self._files.close(lambda path: path.name < file)


def in_order(
    items: Sequence[Output], work: Callable[[Output], list[str]], threads: int, stop: threading.Event
) -> Generator[tuple[Output, list[str]]]:
    """Yield what `work` makes of the items, in their order, several at work at a time.

    `stop` is set when no more of it is wanted.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="weights-cut")
    running: deque[tuple[Output, Future[list[str]]]] = deque()
    try:
        for item in items:
            running.append((item, pool.submit(work, item)))
            if len(running) > 2 * threads:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
