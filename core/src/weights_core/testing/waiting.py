# SPDX-License-Identifier: Apache-2.0
"""For tests with processes of their own: wait for something, and find who runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def until(done: Callable[[], T], seconds: float = 20.0, pause: float = 0.01) -> T:
    """Wait until `done()` is true, and return it.

    Raises:
        AssertionError: it was not within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        found = done()
        if found:
            return found
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(pause)


def running(*words: str) -> list[int]:
    """Return the processes whose command line has all the words."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command = (folder / "cmdline").read_bytes()
                if all(word.encode() in command for word in words):
                    found.append(int(folder.name))
    return found
