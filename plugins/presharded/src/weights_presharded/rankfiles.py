# SPDX-License-Identifier: Apache-2.0
"""The files of a rank: where each tensor lies in them, known before a byte is written."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from weights_core import TensorMeta, dtypes
from weights_core.errors import CheckpointError
from weights_presharded.manifest import files_of

MAX_FILE = 5_000_000_000
"""Bytes of tensors in a file, unless a tensor alone has more."""
_HEADER_ALIGNMENT = 4096


@attrs.frozen
class RankFile:
    """One safetensors file: its name, its header, and each tensor's offset from the start of the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


def laid_out(metas: Iterable[TensorMeta], max_file: int = MAX_FILE) -> list[RankFile]:
    """Return the files that hold tensors, in order; each file has at most `max_file` bytes of them.

    Within a file the wider elements come first, so that every tensor is aligned.
    """
    groups: list[list[TensorMeta]] = []
    room = 0
    for meta in metas:
        if not groups or meta.nbytes > room:
            groups.append([])
            room = max_file
        groups[-1].append(meta)
        room -= meta.nbytes
    names = files_of(len(groups))
    return [_laid_out(name, group) for name, group in zip(names, groups, strict=True)]


def _laid_out(name: str, metas: Sequence[TensorMeta]) -> RankFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for meta in sorted(metas, key=lambda meta: -dtypes.BITS[meta.dtype]):
        begins[meta.name] = end
        offsets = [end, end + meta.nbytes]
        entries[meta.name] = {"dtype": meta.dtype, "shape": list(meta.shape), "data_offsets": offsets}
        end += meta.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    start = len(header)
    return RankFile(name, header, {n: start + begin for n, begin in begins.items()}, start + end)


class OpenFile:
    """A file that is written at its offsets, by several threads; it has its full size from the start."""

    def __init__(self, path: Path, planned: RankFile) -> None:
        """Make the file, or go on with one that a run before this one has made.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.path = path
        self.fd = -1
        with naming(path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if os.fstat(self.fd).st_size != planned.nbytes:
                    os.ftruncate(self.fd, 0)
                    os.ftruncate(self.fd, planned.nbytes)
                self.write(memoryview(planned.header), 0)
            except BaseException:
                self.close()
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`.

        Raises:
            CheckpointError: there is no room, or the device failed.
        """
        with naming(self.path):
            done = 0
            while done < len(data):
                done += os.pwrite(self.fd, data[done:], offset + done)

    def sync(self) -> None:
        """Have what was written survive a crash of the machine."""
        with naming(self.path):
            os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OpenFiles:
    """The files being written, opened when they are first written to."""

    def __init__(self) -> None:
        self._open: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()

    def at(self, path: Path, planned: RankFile) -> OpenFile:
        """Return a file of these."""
        with self._lock:
            if path not in self._open:
                self._open[path] = OpenFile(path, planned)
            return self._open[path]

    def sync(self) -> None:
        """Sync every file."""
        with self._lock:
            files = list(self._open.values())
        for file in files:
            file.sync()

    def close(self, done: Callable[[Path], bool] = lambda _: True) -> None:
        """Close those that are done with."""
        with self._lock:
            for path in [path for path in self._open if done(path)]:
                self._open.pop(path).close()


class naming:  # noqa: N801 - used as a statement
    """Say of which file an error of the system is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot be written: {error.strerror}", file=self._path) from error


def write_whole(path: Path, data: bytes | Iterator[bytes]) -> None:
    """Write a small file so that it is there with all its bytes, or not at all, also after a crash.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        try:
            with open(part, "wb") as out:
                for piece in [data] if isinstance(data, bytes) else data:
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a crash of the machine."""
    with naming(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        CheckpointError: it cannot be made.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
