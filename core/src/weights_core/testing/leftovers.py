# SPDX-License-Identifier: Apache-2.0
"""What a process holds that it must give back: descriptors, threads, children, shared memory, files."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import threading
import time
from pathlib import Path

import attrs

_SHARED_MEMORY = Path("/dev/shm")


@attrs.frozen
class Held:
    """A snapshot; two of them tell what came in between.

    Covers open descriptors (files, sockets, memfds), Python's threads, child processes, entries of
    `/dev/shm` and of the folder for temporary files.
    """

    things: frozenset[str]

    @classmethod
    def now(cls) -> Held:
        """Return what this process holds now."""
        temporary = Path(tempfile.gettempdir())
        return cls(
            frozenset(
                [
                    *_descriptors(),
                    *(f"thread {thread.name} ({thread.ident})" for thread in threading.enumerate()),
                    *(f"process {pid}" for pid in _children()),
                    *(str(entry) for entry in temporary.iterdir()),
                    *(str(entry) for entry in _segments()),
                ]
            )
        )

    def left_over(self, *, settle: float = 2.0) -> list[str]:
        """Return what is held now and was not then, once `settle` seconds have not made it go."""
        deadline = time.monotonic() + settle
        while left := sorted(Held.now().things - self.things):
            if time.monotonic() > deadline:
                return left
            gc.collect()
            time.sleep(0.01)
        return []


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(f"descriptor {number} of {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the one that listed the folder
            continue
    return found


def _segments() -> list[Path]:
    """Return the entries of `/dev/shm` that are ours to remove: not those that a stranger has open."""
    entries = list(_SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else []
    if not entries:
        return []
    strangers = set()
    ours = {os.getpid(), *_children()}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in ours:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                strangers |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
                strangers |= {line.rpartition(" ")[2] for line in (process / "maps").read_text().splitlines()}
    return [entry for entry in entries if str(entry) not in strangers]


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found
