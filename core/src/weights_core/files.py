# SPDX-License-Identifier: Apache-2.0
"""Positioned reads from a file that must not change while it is read."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from weights_core.errors import CheckpointError


class File:
    """A regular file opened for positioned reads; safe to share between threads.

    The descriptor is held from the first check to the last read, so a file that is replaced is
    read as it was; one that is truncated or rewritten meanwhile is an error, never wrong bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            CheckpointError: it does not exist, may not be read, or is not a regular file.
        """
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError("is not a regular file", file=path)
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
            raise CheckpointError(f"{exc.strerror}{link}", file=path) from exc
        except OSError as exc:
            raise CheckpointError(_why(exc), file=path) from exc
        self.close = weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        self.size = found.st_size
        self._version = _version(found)

    def fileno(self) -> int:
        """Return the descriptor, for those who read in ways of their own and then `check_unchanged`.

        Raises:
            CheckpointError: the file was closed.
        """
        self._check_open()
        return self._fd

    def read(self, count: int, offset: int) -> bytes:
        """Return exactly `count` bytes from `offset`.

        Raises:
            CheckpointError: as `read_into`.
        """
        out = bytearray(count)
        self.read_into(memoryview(out), offset)
        return bytes(out)

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill `out` (bytes) from `offset`; short reads are continued.

        What was filled before an error is worthless: the caller must not use it.

        Raises:
            CheckpointError: the file ended early, changed, or the device failed.
        """
        self._check_open()
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as exc:
                raise CheckpointError(_why(exc), file=self.path, offset=offset + done) from exc
            if got == 0:
                raise CheckpointError("the file became shorter", file=self.path, offset=offset + done)
            done += got
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Compare size and times with those at opening.

        Raises:
            CheckpointError: the file was written to since, or closed.
        """
        self._check_open()
        if _version(os.fstat(self._fd)) != self._version:
            raise CheckpointError("the file was changed while it was read", file=self.path)

    def _check_open(self) -> None:
        if not self.close.alive:  # the descriptor's number may be another file's by now
            raise CheckpointError("was closed: the load it was opened for has ended", file=self.path)


def _version(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _why(exc: OSError) -> str:
    if isinstance(exc, PermissionError):
        return f"no permission to read it ({exc.strerror})"
    return exc.strerror or str(exc)
