# SPDX-License-Identifier: Apache-2.0
"""A budget of bytes that readers share with the consumer they run ahead of."""

from __future__ import annotations

import threading


class Window:
    """At most `limit` bytes are taken at a time; a single larger tensor is let in alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, count: int, kept: int = 0) -> bool:
        """Wait until `count` bytes fit, and take them; False if the window was closed.

        `kept` bytes of those taken can't be given back before the caller has gone on, so it is not
        to wait for them.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._taken <= kept or self._taken + count <= self._limit
            )
            if self._closed:
                return False
            self._taken += count
            return True

    def give_back(self, count: int) -> None:
        """Return `count` bytes that were taken."""
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def close(self) -> None:
        """Wake every waiter and let no more bytes be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
