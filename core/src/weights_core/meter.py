# SPDX-License-Identifier: Apache-2.0
"""Measure a load: seconds, bytes and resident memory, per phase and over time."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator

import attrs

_INTERVAL = 0.02
_MOST_SAMPLES = 4096


@attrs.frozen(kw_only=True)
class Phase:
    """One phase of a load, which began `began` seconds into it.

    `nbytes` were fetched in it; `peak_rss` is this process's, in bytes.
    """

    name: str
    began: float
    seconds: float
    nbytes: int
    peak_rss: int

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (1e9) per second, 0 for a phase that fetched nothing."""
        return self.nbytes / self.seconds / 1e9 if self.nbytes and self.seconds else 0.0


@attrs.frozen
class Sample:
    """What was seen `seconds` into the load: resident memory, and bytes fetched so far."""

    seconds: float
    rss: int
    nbytes: int


class Meter:
    """Measures phases; while it runs, a thread takes a sample every 20 ms.

    A long load keeps at most 4096 samples: when they are full, every other one is dropped and the
    interval doubles.
    """

    def __init__(self, fetched: Callable[[], int], watch: Callable[[int], object] | None = None) -> None:
        """Prepare.

        Args:
            fetched: returns the bytes fetched so far.
            watch: is called with them at every sample, to show progress.
        """
        self.phases: list[Phase] = []
        self.samples: list[Sample] = []
        self.start_rss = rss()
        self._began = time.perf_counter()
        self._fetched = fetched
        self._watch = watch
        self._peak = self.start_rss
        self._interval = _INTERVAL
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weights-meter", daemon=True)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def close(self) -> None:
        """Stop sampling and join the thread; idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase; it is recorded if its block ends without an error."""
        high, before = _high_water(), self._fetched()
        self._peak = rss()
        began = time.perf_counter()
        self.sample()
        yield
        seconds = time.perf_counter() - began
        self.sample()
        peak = self._peak
        if _high_water() > high:  # the process's record was broken in this phase: exact, not sampled
            peak = max(peak, _high_water())
        self.phases.append(
            Phase(
                name=name,
                began=began - self._began,
                seconds=seconds,
                nbytes=max(0, self._fetched() - before),
                peak_rss=peak,
            )
        )

    def sample(self) -> None:
        """Take a sample now."""
        with self._lock:  # phases sample in the load's thread
            sample = Sample(time.perf_counter() - self._began, rss(), self._fetched())
            self._peak = max(self._peak, sample.rss)
            self.samples.append(sample)
            if len(self.samples) >= _MOST_SAMPLES:
                del self.samples[1::2]
                self._interval *= 2
        if self._watch is not None:
            self._watch(sample.nbytes)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()


def rss() -> int:
    """Return this process's resident memory in bytes; 0 where /proc does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def _high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
