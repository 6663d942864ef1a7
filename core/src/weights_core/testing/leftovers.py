# SPDX-License-Identifier: Apache-2.0
"""What a process holds that it must give back: descriptors, threads, children, shared memory, files."""

from __future__ import annotations

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
        folders = (_SHARED_MEMORY, Path(tempfile.gettempdir()))
        return cls(
            frozenset(
                [
                    *_descriptors(),
                    *(f"thread {thread.name} ({thread.ident})" for thread in threading.enumerate()),
                    *(f"process {pid}" for pid in _children()),
                    *(str(entry) for folder in folders if folder.is_dir() for entry in folder.iterdir()),
                ]
            )
        )

    def left_over(self, *, settle: float = 2.0) -> list[str]:
        """Return what is held now and was not then, once `settle` seconds have not made it go."""
        deadline = time.monotonic() + settle
        while True:
            gc.collect()
            left = sorted(Held.now().things - self.things)
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.02)


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(f"descriptor {number} of {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the one that listed the folder
            continue
    return found


def _children() -> list[int]:
    return [
        int(pid)
        for task in os.listdir("/proc/self/task")
        for pid in Path(f"/proc/self/task/{task}/children").read_text().split()
    ]
