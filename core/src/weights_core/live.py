# SPDX-License-Identifier: Apache-2.0
"""Which shared memory this process has mapped, so that what is shared already is not copied to be shared.

Addresses belong to the process, and so does this: it holds segments weakly, and only to find them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weights_core.arena import Shared

_segments: weakref.WeakSet[Shared] = weakref.WeakSet()
_lock = threading.Lock()


def add(segment: Shared) -> None:
    """Have a segment be found as long as it lives."""
    with _lock:
        _segments.add(segment)


def holding(addresses: Iterable[int]) -> list[Shared]:
    """Return the segments that hold one of `addresses` and can be handed on, each memory once."""
    with _lock:
        known = [segment for segment in _segments if segment.is_open]
    known.sort(key=lambda segment: segment.address)
    wanted = sorted(addresses)
    found: dict[int, Shared] = {}
    at = 0
    for segment in known:
        while at < len(wanted) and wanted[at] < segment.address:
            at += 1
        if at < len(wanted) and wanted[at] < segment.address + segment.nbytes:
            found.setdefault(segment.address, segment)
    return list(found.values())
