# SPDX-License-Identifier: Apache-2.0
"""Host memory for tensors that is back with the system the moment the last of them dies.

What the C library's allocator is given back it mostly keeps for itself. Here memory is mapped, and
unmapped when nothing refers to it: a large tensor has a mapping of its own, small ones share one.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import torch

SHARED = 8 << 20
"""Bytes of a mapping that small tensors share."""
SMALL = 1 << 20
"""The most bytes of a tensor that shares one."""
_HUGE = 2 << 20
_ALIGNMENT = 64


class Lender:
    """Lends memory to tensors, and never takes it back from one that lives. Thread-safe."""

    def __init__(self) -> None:
        self._shared: mmap.mmap | None = None
        self._used = 0
        self._lock = threading.Lock()

    def lend(self, nbytes: int) -> torch.Tensor:
        """Return uninitialised memory as a flat tensor of uint8, whose storage is that memory alone.

        Raises:
            OSError: the system has no memory.
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        # The tensor's storage keeps the memoryview, which keeps the mapping.
        part = self._part(nbytes) if nbytes <= SMALL else memoryview(_mapped(nbytes))[:nbytes]
        return torch.frombuffer(part, dtype=torch.uint8)

    def trim(self) -> None:
        """Give the shared mapping back, unless a tensor lives on it."""
        with self._lock:
            if self._shared is not None:
                shared = weakref.ref(self._shared)
                self._shared = None  # which unmaps it, if that was the last reference
                self._shared = shared()

    def _part(self, nbytes: int) -> memoryview:
        with self._lock:
            if self._shared is None or self._used + nbytes > SHARED:
                self._shared, self._used = _mapped(SHARED), 0
            begin = self._used
            self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            return memoryview(self._shared)[begin : begin + nbytes]


def _mapped(nbytes: int) -> mmap.mmap:
    """Map memory: private, so that a forked child's writes are its own."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE:
        with contextlib.suppress(OSError):  # a kernel without huge pages; they are only faster
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
