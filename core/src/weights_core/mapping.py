# SPDX-License-Identifier: Apache-2.0
"""Give back the pages of a file that someone else has mapped, once they have been read."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


class MappedFile:
    """Where this process has mapped a file, privately and to read only.

    Pages of a mapping count as this process's until it ends, however briefly they were needed.
    """

    def __init__(self, path: Path) -> None:
        """Find the mappings of `path` there are now; without /proc there are none."""
        self._ranges = []
        name = os.path.realpath(path)
        try:
            with open("/proc/self/maps") as maps:
                rows = [row.rstrip("\n").split(maxsplit=5) for row in maps]
        except FileNotFoundError:
            rows = []
        for row in rows:
            if row[-1] == name and row[1].endswith("p"):
                begin, end = (int(address, 16) for address in row[0].split("-"))
                self._ranges.append(range(begin, end))

    def drop(self, begin: int, count: int) -> None:
        """Give back the whole pages among `count` bytes at address `begin`, if they are the file's.

        Reading them again brings them back. They must not have been written to.
        """
        end = (begin + count) // mmap.PAGESIZE * mmap.PAGESIZE
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if begin < end and any(begin in held and end - 1 in held for held in self._ranges):
            _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


_libc = ctypes.CDLL(None)
