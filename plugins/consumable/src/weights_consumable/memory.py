# SPDX-License-Identifier: Apache-2.0
"""Host memory for tensors that is back with the system the moment the last of them dies.

What the C library's allocator is given back it mostly keeps for itself. Here memory is mapped, and
unmapped when nothing refers to it: a large tensor has a mapping of its own, small ones share one.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import torch

from weights_core.tensors import allocate

SMALL = {16 << 10: 256 << 10, 1 << 20: 8 << 20}
"""The most bytes of a tensor that shares a mapping → the bytes of that mapping. Two sizes, as scales
that are kept should not hold the room of weights."""
_ALIGNMENT = 64


class Lender:
    """Lends memory to tensors, and never takes it back from one that lives. Thread-safe."""

    def __init__(self) -> None:
        self._shared = [_Shared(most, size) for most, size in SMALL.items()]
        self._lock = threading.Lock()

    def lend(self, nbytes: int, offset: int = 0) -> torch.Tensor:
        """Return uninitialised memory as a flat tensor of uint8, whose storage is that memory alone.

        Large memory is congruent to `offset`, the place in a file that is read there, modulo a page.

        Raises:
            MemoryError: the system has none.
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        shared = next((shared for shared in self._shared if nbytes <= shared.most), None)
        if shared is None:
            return allocate(nbytes, offset)  # mapped for it alone
        with self._lock:
            part = shared.part(nbytes)
        return torch.frombuffer(part, dtype=torch.uint8)  # its storage keeps `part`, which keeps the mapping

    def trim(self) -> None:
        """Give shared mappings back that no tensor lives on, unless hardly touched."""
        with self._lock:
            for shared in self._shared:
                shared.trim()

    def close(self) -> None:
        """Keep no memory; what tensors live on goes with them."""
        with self._lock:
            for shared in self._shared:
                shared.forget()


class _Shared:
    """The mapping that the next tensors of at most `most` bytes get a part of.

    Parts behind the last that lives are lent again, so that whoever drops each tensor before the next
    stays on the same few pages; an eighth of the mapping at most is kept for that when trimmed.
    """

    def __init__(self, most: int, size: int) -> None:
        self.most = most
        self._size = size
        self._mapping: mmap.mmap | None = None
        self._parts: list[tuple[int, weakref.ref[memoryview]]] = []  # where each begins
        self._used = self._touched = 0

    def part(self, nbytes: int) -> memoryview:
        self._rewind()
        if self._mapping is None or self._used + nbytes > self._size:
            self.forget()
            self._mapping = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        part = memoryview(self._mapping)[self._used : self._used + nbytes]
        self._parts.append((self._used, weakref.ref(part)))
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._touched = max(self._touched, self._used)
        return part

    def trim(self) -> None:
        self._rewind()
        if not self._parts and self._touched > self._size // 8:
            self.forget()

    def forget(self) -> None:
        self._mapping, self._parts = None, []
        self._used = self._touched = 0

    def _rewind(self) -> None:
        while self._parts and self._parts[-1][1]() is None:
            self._used, _ = self._parts.pop()
