# SPDX-License-Identifier: Apache-2.0
"""Files that are mapped: by us, so that nothing is copied, or by others, whose pages are given back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_core.files import File
from weights_core.memory import PAGE, Mapping, libc

if TYPE_CHECKING:
    import torch

_POPULATE_READ = 22
_EHWPOISON = 133
_UNREADABLE = (errno.EFAULT, _EHWPOISON)
_BLOCK = 1 << 20


class FilePages:
    """A whole file, mapped privately: who writes to a page gets a copy of it, and the file stays as it is.

    The mapping lives as long as this or a tensor in it. The pages of a tensor go back when it dies.
    """

    def __init__(self, file: File) -> None:
        """Map `file`; nothing is read.

        Raises:
            ArenaError: the kernel refuses, e.g. for want of address space.
        """
        self._file = file
        self._mapping = Mapping(file.fileno(), file.size, "private")
        self._brought: list[range] = []
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):  # a hint: twice the read-ahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def bring(self, offset: int, count: int) -> int:
        """Read bytes into their pages, once; return 0, or the number of the kernel's error."""
        begin, end = offset // PAGE * PAGE, -(-(offset + count) // PAGE) * PAGE
        if any(begin in done and end <= done.stop for done in self._brought):
            return 0
        if libc().madvise(self._mapping.address + begin, end - begin, _POPULATE_READ):
            return ctypes.get_errno()
        with self._lock:
            joined, others = range(begin, end), []
            for done in self._brought:
                if done.stop < joined.start or joined.stop < done.start:
                    others.append(done)
                else:
                    joined = range(min(joined.start, done.start), max(joined.stop, done.stop))
            self._brought = [*others, joined]
        return 0

    def tensor(self, offset: int, count: int) -> torch.Tensor | None:
        """Return bytes as a flat uint8 tensor, or None where the kernel cannot bring pages in at once.

        Every page of it has been read: what a device or a file cut short would do to the process later,
        in the middle of something else, is an error now.

        Raises:
            CheckpointError: the bytes cannot be read, or the file was changed.
        """
        import torch

        error = self.bring(offset, count)
        if error in _UNREADABLE:
            for at in range(offset, offset + count, _BLOCK):  # says what is wrong, and where
                self._file.read(min(_BLOCK, offset + count - at), at)
        if error:
            return None  # before Linux 5.14, or memory is short
        self._file.check_unchanged()
        address = self._mapping.address + offset
        memory: Any = (ctypes.c_ubyte * count).from_address(address)
        memory.owner = _Owner()  # the tensor keeps the buffer, which keeps this
        weakref.finalize(memory.owner, _give_back, self._mapping, address, count).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)


class _Owner:
    """What dies with the last tensor on some bytes."""


def _give_back(mapping: Mapping, begin: int, count: int) -> None:
    """Give back the whole pages among bytes that nothing refers to any more; `mapping` lives until then."""
    del mapping
    _drop(begin, count)


def _drop(begin: int, count: int) -> None:
    end = (begin + count) // PAGE * PAGE
    begin = -(-begin // PAGE) * PAGE
    if begin < end:
        libc().madvise(begin, end - begin, mmap.MADV_DONTNEED)


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
        first, last = -(-begin // PAGE) * PAGE, (begin + count) // PAGE * PAGE - 1
        if any(first in held and last in held for held in self._ranges):
            _drop(begin, count)
