# SPDX-License-Identifier: Apache-2.0
"""One file's descriptors, and which of them reads a range: past the page cache, or out of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from typing import TypeAlias

import attrs

from weights_core.errors import CheckpointError
from weights_core.files import File
from weights_parallel_shards.tuning import ALIGNMENT, REGION, Direct

Segments: TypeAlias = list[tuple[int, int]]
"""Where bytes go: an address and a length each, one after the other in the file."""

_MEMORY = memoryview((ctypes.c_char * (1 << 56)).from_address(0)).cast("B")
"""This process's address space; slicing it touches nothing."""

_CACHESTAT = 451
"""The number of the system call, on every architecture but Alpha; Linux 6.5 and later."""

_LIBC = ctypes.CDLL(None, use_errno=True)


def memory(address: int, size: int) -> memoryview:
    """Return `size` bytes of this process from `address` on; the caller keeps them alive."""
    return _MEMORY[address : address + size]


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Read from `offset` into `buffers`; the one place where tensor data is read."""
    return os.preadv(fd, buffers, offset)


@attrs.frozen
class Way:
    """How to read a range: on which descriptor, aligned to what, and whether to drop it from the cache."""

    fd: int
    align: int = 1
    drop: bool = False


class ReadError(Exception):
    """A read failed at byte `offset`, for the reason `why`."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(why)
        self.offset = offset


class Storage:
    """An open weights file, read directly where the file system can and nothing is cached.

    The descriptors beyond the one of `file` are opened through it, so they are the same file even if
    its path now leads to another.
    """

    def __init__(self, file: File, direct: Direct) -> None:
        self.file = file
        self._direct = direct
        self._fds: dict[int, int | None] = {}
        self._cached: dict[int, bool | None] = {}
        self._copies: dict[int, list[int]] = {}
        self._refused = False

    def way(self, begin: int, end: int) -> Way:
        """Decide how to read from byte `begin` to `end`.

        What is cached is read from the cache; whether it is, one page tells for a whole region, as counting
        all would take a sixth of the time of reading them. What is not is read directly; and where
        that cannot be, through the cache, from which it is dropped again unless a part was there before.

        Raises:
            CheckpointError: the file was closed, or direct reads were demanded and cannot be had.
        """
        fd = self.file.fileno()
        if self._direct == "never":
            return Way(fd)
        cached = False if self._direct == "always" else self._region_is_cached(begin, end)
        if cached:
            return Way(fd)
        direct = None if self._refused else self._open(os.O_DIRECT)
        if direct is not None:
            return Way(direct, align=ALIGNMENT)
        if self._direct == "always":
            raise CheckpointError(
                "direct = 'always', and its file system has no direct I/O", file=self.file.path
            )
        quiet = self._open(0)
        ours = cached is False and not _cached_pages(fd, begin, end)
        return Way(fd if quiet is None else quiet, drop=ours)

    def read(self, way: Way, segments: Segments, begin: int, end: int) -> None:
        """Fill `segments` from byte `begin` on, at least up to `end`; short reads are continued.

        A direct read that stops short, or that the file system refuses after all, goes on buffered.

        Raises:
            ReadError: the device failed or the file ended early.
        """
        fd, position = way.fd, begin
        while position < end:
            buffers = [memory(address, size) for address, size in _after(segments, position - begin)]
            try:
                got = preadv(fd, buffers, position)
            except OSError as exc:
                if exc.errno == errno.EINVAL and fd != self.file.fileno() and self._direct == "auto":
                    self._refused = True  # others may be reading on it, so it is closed later
                    fd = self.file.fileno()
                    continue
                raise ReadError(position, exc.strerror or str(exc)) from exc
            if got == 0:
                raise ReadError(position, "the file became shorter")
            position += got
            fd = self.file.fileno()
        self.forget(way, begin, end)

    def forget(self, way: Way, begin: int, end: int) -> None:
        """Drop what was read from the page cache, if it was only there for us."""
        if way.drop:
            size = -(-end // ALIGNMENT) * ALIGNMENT - begin // ALIGNMENT * ALIGNMENT
            os.posix_fadvise(way.fd, begin // ALIGNMENT * ALIGNMENT, size, os.POSIX_FADV_DONTNEED)

    def descriptor(self, fd: int, count: int) -> int:
        """Return one of `count` copies of a descriptor, each time the next; fewer if there are none left.

        Not safe to use from several threads.
        """
        copies = self._copies.setdefault(fd, [fd])
        if len(copies) < count:
            with contextlib.suppress(OSError):
                copies.append(os.dup(fd))
                return copies[-1]
        copies.append(copies.pop(0))
        return copies[-1]

    def close_copies(self) -> None:
        """Close what `descriptor` has returned; idempotent."""
        while self._copies:
            fd, copies = self._copies.popitem()
            for copy in copies:
                if copy != fd:
                    os.close(copy)

    def close(self) -> None:
        """Close the descriptors opened here; idempotent."""
        self.close_copies()
        while self._fds:
            _, fd = self._fds.popitem()
            if fd is not None:
                os.close(fd)

    def _region_is_cached(self, begin: int, end: int) -> bool | None:
        """Ask for the first chunk of each region, and take the answer for the others."""
        region = begin // REGION
        if region not in self._cached:
            self._cached[region] = self.is_cached((begin + end) // 2)
        return self._cached[region]

    def is_cached(self, offset: int) -> bool | None:
        """Return whether a byte's page is in the page cache, or None if that can't be known.

        Where the kernel doesn't tell, or not us, the byte is read on condition that it needs no waiting;
        the descriptor has no readahead, so a page that isn't there is all that this brings in.
        """
        counted = _cached_pages(self.file.fileno(), offset, offset + 1)
        if counted is not None:
            return counted > 0
        quiet = self._open(0)
        if quiet is None:
            return None
        try:
            return os.preadv(quiet, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError:  # a file system that can't say
            return None

    def _open(self, flags: int) -> int | None:
        """Return a descriptor with `flags` and without readahead, opened once; None if it can't be had."""
        if flags in self._fds:
            return self._fds[flags]
        path = f"/proc/self/fd/{self.file.fileno()}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError:  # no direct I/O here, or no descriptor left
            return self._fds.setdefault(flags, None)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        first = self._fds.setdefault(flags, fd)  # no lock: one held when a process forks stays held
        if first != fd:
            os.close(fd)
        return first


def _cached_pages(fd: int, begin: int, end: int) -> int | None:
    """Return how many pages of a range are cached, or None if the kernel doesn't say."""
    extent = (ctypes.c_uint64 * 2)(begin, end - begin)
    counts = (ctypes.c_uint64 * 5)()
    if _LIBC.syscall(ctypes.c_long(_CACHESTAT), ctypes.c_int(fd), extent, counts, ctypes.c_uint(0)):
        return None
    return counts[0]


def _after(segments: Segments, done: int) -> Segments:
    """Return what is left of `segments` when `done` bytes are filled."""
    if not done:
        return segments
    left: Segments = []
    for address, size in segments:
        skip = min(size, done)
        done -= skip
        if skip < size:
            left.append((address + skip, size - skip))
    return left
