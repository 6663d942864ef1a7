# SPDX-License-Identifier: Apache-2.0
"""A progress bar over the bytes of a load, whoever fetches them."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tqdm import tqdm

Show = Literal["rank 0", "every rank", "never"]


class Progress:
    """A bar on standard error, silent where that is no terminal."""

    def __init__(self, show: Show, rank: int, world: int) -> None:
        self._wanted = show == "every rank" or (show == "rank 0" and rank == 0)
        self._label = "weights" if world == 1 else f"weights, rank {rank}"
        self._row = rank if show == "every rank" else 0
        self._bar: tqdm[None] | None = None
        self._lock = threading.Lock()  # a load and its meter's thread both report

    @property
    def wanted(self) -> bool:
        """Whether there is anyone to show a bar to: what it costs to prepare one is spent only then."""
        return self._wanted and sys.stderr is not None and sys.stderr.isatty()

    def start(self, total: int) -> None:
        """Show a bar of `total` bytes, in place of one that was shown before."""
        self.close()
        with self._lock:
            self._bar = _bar(total, self._label, self._row) if self.wanted else None

    def show(self, done: int) -> None:
        """Say that `done` bytes have been fetched."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is; idempotent."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = None


def _bar(total: int, label: str, row: int) -> tqdm[None]:
    from tqdm import tqdm

    class Quiet(tqdm):  # type: ignore[type-arg]
        monitor_interval = 0  # no thread that outlives the load

    return Quiet(total=total, desc=label, position=row, unit="B", unit_scale=True)
