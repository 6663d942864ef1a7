# SPDX-License-Identifier: Apache-2.0
"""The numbers a reader works by, and how they follow from the settings. All were measured."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

Direct: TypeAlias = Literal["auto", "always", "never"]

ALIGNMENT = 4096
"""Bytes to which direct I/O is aligned in file and memory; what every Linux file system takes."""

GAP = 64 << 10
"""Bytes between two wanted ranges of a file from which on two reads are cheaper than one over both."""

STRAIGHT = 64 << 10
"""Bytes of a tensor from which on a direct read goes straight to it, not through staging memory."""

BUFFERS = 500
"""Tensors that one read fills at most; the system takes 1024 buffers, and each may need two."""

SPARE = 128 << 10
"""Bytes of staging memory beyond a chunk: the edges of aligned reads, and of their parts."""

REGION = 64 << 20
"""Bytes of a file that are taken to be cached, or not, together: to ask costs up to 80 µs."""

SLOT, SMALLEST_SLOT = 16 << 20, 512 << 10
"""Bytes of one staging buffer: a chunk and `SPARE`."""

LEAST = 1 << 20
"""The smallest `max_host_bytes`: one reader, the smallest chunk, and room to read ahead."""

HOST_BYTES, HOST_BYTES_CUDA = 256 << 20, 128 << 20
"""What `max_host_bytes` is by default."""

READERS_LOCAL, READERS_REMOTE = 8, 16
READERS_CUDA, AHEAD_CUDA, SLOT_CUDA = 15, 5, 4 << 20


@attrs.frozen(kw_only=True)
class Tuning:
    """How many `readers` read chunks of how many bytes, and into how many staging buffers (`slots`).

    What is read ahead of the consumer of a stream takes up to `window` bytes. Up to `inline` bytes
    threads cost more than they bring, and the caller's thread reads.
    """

    readers: int
    chunk: int
    slots: int
    window: int
    direct: Direct = "auto"
    inline: int = 8 << 20

    @property
    def slot_bytes(self) -> int:
        """Bytes of one staging buffer."""
        return self.chunk + SPARE


def tune(limit: int | None, *, threads: int | None, direct: Direct, remote: bool, cuda: bool) -> Tuning:
    """Fit readers and chunks into `limit` bytes: staging takes a half at most, the window the rest.

    For a GPU, to which nothing is read ahead, staging may take all.

    Args:
        limit: bytes of host memory, `LEAST` or more; None for what reads fastest.
        threads: readers; None lets the storage decide.
        direct: see the plugin's settings.
        remote: whether the files come over a network, whose latency more readers hide.
        cuda: whether the readers feed a GPU.
    """
    slot, ahead = (SLOT_CUDA, AHEAD_CUDA) if cuda else (SLOT, 0)
    readers = threads or (READERS_CUDA if cuda else READERS_REMOTE if remote else READERS_LOCAL)
    if limit is None:
        limit = HOST_BYTES_CUDA if cuda else HOST_BYTES
    room = limit if cuda else limit // 2
    while (readers + ahead) * slot > room and slot > SMALLEST_SLOT:
        slot //= 2
    slots = max(1, min(readers + ahead, room // slot))
    readers, chunk = min(readers, slots), slot - SPARE
    window = chunk if cuda else limit - slots * slot - chunk
    return Tuning(readers=readers, chunk=chunk, slots=slots, window=window, direct=direct)
