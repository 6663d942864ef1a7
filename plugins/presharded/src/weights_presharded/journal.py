# SPDX-License-Identifier: Apache-2.0
"""What a conversion has done so far, so that one that was interrupted can go on."""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weights_core.errors import CheckpointError
from weights_presharded.manifest import JOURNAL, READY
from weights_presharded.rankfiles import naming

SCHEMA = "weights.sharding/1"


class Journal:
    """The tensors that are written and synced, with their digests by rank; held by one process.

    Lines of JSON: the first says what is made of what, each other what was done. A line that is torn is
    as good as none.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, resume: bool) -> None:
        """Begin, or go on.

        Args:
            folder: where the conversion writes.
            key: tells this conversion from others.
            resume: whether to go on with what is there.

        Raises:
            CheckpointError: another process is at work there, something is there and `resume` is false,
                or what is there was begun as another conversion.
        """
        self.path = folder / JOURNAL
        with naming(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self.close = weakref.finalize(self, os.close, self._fd)
        self.done: dict[str, list[str]] = {}
        try:
            self._begin(folder, {"schema": SCHEMA, **key}, resume=resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, folder: Path, key: Mapping[str, Any], *, resume: bool) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise CheckpointError("another process is converting to this folder", file=folder) from exc
        with naming(self.path):
            raw = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        whole = raw[: raw.rfind(b"\n") + 1]  # what is torn was not done
        first, *lines = whole.split(b"\n")
        begun = _parsed(first)
        if begun is not None and not resume:
            raise CheckpointError("holds a conversion that was interrupted: --resume goes on", file=folder)
        if begun is not None:
            self._check(folder, begun, key)
        for told in map(_parsed, lines):
            self.done.update(told["done"] if told and isinstance(told.get("done"), dict) else {})
        with naming(self.path):
            os.ftruncate(self._fd, len(whole) if begun is not None else 0)
            if begun is None:
                _append(self._fd, key)

    def add(self, done: Mapping[str, Sequence[str]]) -> None:
        """Record tensors whose bytes are synced.

        Raises:
            CheckpointError: the journal cannot be written.
        """
        with naming(self.path):
            _append(self._fd, {"done": done})
            os.fdatasync(self._fd)

    def remove(self) -> None:
        """Forget it: the folder is complete."""
        with naming(self.path):
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _check(folder: Path, begun: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        other = [name for name in sorted({*begun, *key}) if begun.get(name) != key.get(name)]
        if other:
            raise CheckpointError(
                f"holds a conversion that was begun with another {', '.join(other)}: delete the folder, "
                "or give another --out",
                file=folder,
            )


def refuse_others(folder: Path) -> None:
    """Refuse a folder that holds something else than a conversion.

    Raises:
        CheckpointError: it does.
    """
    with naming(folder):
        names = {entry.name for entry in os.scandir(folder)}
    if names and not names & {JOURNAL, READY}:
        raise CheckpointError(
            "holds other files: give the path of a folder that is empty or new", file=folder
        )


def _append(fd: int, line: Mapping[str, Any]) -> None:
    os.lseek(fd, 0, os.SEEK_END)
    view = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    while view:
        view = view[os.write(fd, view) :]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None
