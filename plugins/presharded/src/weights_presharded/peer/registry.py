# SPDX-License-Identifier: Apache-2.0
"""Where sources are found: a directory on one host, or Redis for many.

A registry says only who might have what. Whoever asks a source proves the token first, and believes
bytes by their digests.
"""

from __future__ import annotations

import abc
import contextlib
import os
import stat
import time
from collections.abc import Collection, Iterator

from weights_core import place
from weights_core.errors import WeightsError
from weights_presharded.peer.entry import MAX_BYTES, Entry

_SUFFIX = ".json"
_MANY = 65536


class RegistryError(WeightsError):
    """The registry cannot be reached or trusted; says what to do."""


class Registry(abc.ABC):
    """Holds the entries of sources that live."""

    name: str
    """What it is, for reports; without passwords."""

    @abc.abstractmethod
    def put(self, entry: Entry) -> None:
        """Write an entry, over its former self; a source does so at every beat.

        Raises:
            RegistryError: it cannot.
        """

    @abc.abstractmethod
    def remove(self, entry: Entry) -> None:
        """Take an entry away; it may be gone already.

        Raises:
            RegistryError: it cannot.
        """

    @abc.abstractmethod
    def entries(self) -> list[Entry]:
        """Return every sound entry, stale ones included.

        Raises:
            RegistryError: it cannot be read.
        """

    def close(self) -> None:  # noqa: B027 - a directory has nothing to close
        """Let go of connections."""


class DirectoryRegistry(Registry):
    """A folder of one file per source, written atomically; only files of trusted users count."""

    def __init__(self, folder: str, owners: Collection[int]) -> None:
        self.folder = folder
        self.name = f"the directory {folder}"
        self._owners = frozenset(owners)

    def put(self, entry: Entry) -> None:
        """Write the file, making the folder if it is gone."""
        raw, part = entry.dumps(), f".{entry.id}.part"
        with self._open(create=True) as folder:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            try:
                os.write(fd, raw)
            finally:
                os.close(fd)
            os.rename(part, entry.id + _SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)

    def remove(self, entry: Entry) -> None:
        """Remove the file, and the socket beside it."""
        with contextlib.suppress(FileNotFoundError), self._open() as folder:
            for name in (entry.id + _SUFFIX, f".{entry.id}.part", os.path.basename(entry.socket)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)

    def entries(self) -> list[Entry]:
        """Read every file that is a trusted user's."""
        found = []
        try:
            with self._open() as folder:
                for name in sorted(os.listdir(folder))[:_MANY]:
                    entry = self._read(folder, name) if name.endswith(_SUFFIX) else None
                    if entry is not None:
                        found.append(entry)
        except FileNotFoundError:
            return []
        return found

    def _read(self, folder: int, name: str) -> Entry | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return None  # removed in this moment, or a link
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in self._owners:
                return None
            entry = Entry.loads(os.read(fd, MAX_BYTES), time.time() - found.st_mtime)
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)
        return entry if entry.id + _SUFFIX == name else None

    @contextlib.contextmanager
    def _open(self, *, create: bool = False) -> Iterator[int]:
        try:
            folder = place.open_folder(self.folder, owners=self._owners, create=create)
        except FileNotFoundError:
            if create:
                raise RegistryError(f"{self.folder} cannot be made: its parent is not there") from None
            raise
        except place.PlaceError as exc:
            raise RegistryError(
                f"registry: {exc}; mend that, or set registry=FOLDER, a folder of yours"
            ) from exc
        try:
            yield folder
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise RegistryError(f"the registry {self.folder}: {exc.strerror}") from exc
        finally:
            os.close(folder)
