# SPDX-License-Identifier: Apache-2.0
"""Put what is served on the host into huge pages, while it is being served already.

A target maps the source's memory anew. In pages of 4 KiB that costs a third of the copy itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from weights_core.arena import Segment
from weights_core.errors import ArenaError
from weights_core.memory import HUGE, Mapping, collapse

log = logging.getLogger("weights.presharded")

_STEP = 16 << 20


class Settling:
    """A thread that does so, once, and ends; `close` ends it early."""

    def __init__(self, segments: Sequence[Segment], sizes: Sequence[int]) -> None:
        """Begin; the segments' descriptors must stay open until `close`."""
        self._stop = threading.Event()
        self._pieces = [(s.descriptor, size) for s, size in zip(segments, sizes, strict=True) if size >= HUGE]
        self._thread = threading.Thread(target=self._run, name="weights-presharded-settling", daemon=True)
        if self._pieces:
            self._thread.start()

    def close(self) -> None:
        """End it; idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        done = total = 0
        for descriptor, size in self._pieces:
            try:
                mapping = Mapping(descriptor, size, "read")
            except ArenaError as exc:
                log.debug("no huge pages: %s", exc)
                return
            for start in range(0, size, _STEP):
                if self._stop.is_set():
                    return
                total += 1
                done += collapse(mapping.address + start, min(_STEP, size - start))
        log.debug("%d of %d pieces are in huge pages", done, total)
