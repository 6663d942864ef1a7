# SPDX-License-Identifier: Apache-2.0
"""Host memory for tensors that is back with the system the moment the last of them dies.

What the C library's allocator is given back it mostly keeps for itself. Here memory is mapped, and
unmapped when nothing refers to it: a large tensor has a mapping of its own, small ones share one.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref

import attrs
import torch

SHARED = 1 << 20
"""Bytes of a mapping that small tensors share."""
SMALL = SHARED // 16
"""The most bytes of a tensor that shares one; above, rounding up to pages costs under 1/16."""
_HUGE = 2 << 20
_ALIGNMENT = 64


@attrs.frozen(eq=False)
class Loan:
    """`nbytes` of memory that were lent to a tensor; it lives until the tensor's storage dies."""

    nbytes: int
    _memory: weakref.ref[memoryview]

    @property
    def is_live(self) -> bool:
        """Whether a tensor still refers to the memory."""
        return self._memory() is not None


class Lender:
    """Lends memory to tensors, and never takes it back from one that lives. Thread-safe."""

    def __init__(self) -> None:
        self._shared: mmap.mmap | None = None
        self._used = 0
        self._lock = threading.Lock()

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Loan | None]:
        """Return an uninitialised tensor and what tells of its memory; None if it needs none.

        Raises:
            OSError: the system has no memory.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype, device="cpu"), None
        # The tensor's storage keeps this view and only this, the view keeps the mapping.
        view = self._part(nbytes) if nbytes <= SMALL else memoryview(_mapped(nbytes))[:nbytes]
        raw = torch.frombuffer(view, dtype=torch.uint8)
        return raw.view(dtype).reshape(shape), Loan(nbytes, weakref.ref(view))

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
    """Map zeroed memory: private, so that a forked child's writes are its own."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE:
        with contextlib.suppress(OSError):  # a kernel without huge pages; they are only faster
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
