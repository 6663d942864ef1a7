# SPDX-License-Identifier: Apache-2.0
"""Copies to a CUDA device from pinned memory, on a stream of their own."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from typing import Any

import torch

from weights_core.errors import LoadError
from weights_parallel_shards.transfer import Mark

_PORTABLE = 1
"""Pinned for every device of the process."""

_HOST_TO_DEVICE = 1


class CudaChannel:
    """A stream of one CUDA device."""

    def __init__(self, device: torch.device, library: ctypes.PyDLL) -> None:
        """Prepare; `library` is the CUDA runtime, see `runtime`."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._handle: int = self._stream.cuda_stream
        self._memcpy = library.cudaMemcpyAsync

    def staging(self, nbytes: int) -> torch.Tensor:
        """Return pinned memory, registered in huge pages: that takes a tenth of the time of allocating it.

        Raises:
            LoadError: the system does not let it be pinned.
        """
        raw = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw.madvise(mmap.MADV_DONTFORK)  # else the pages that the device knows may become a child's
        with contextlib.suppress(OSError):  # a kernel without huge pages
            raw.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(raw, dtype=torch.uint8).zero_()  # by all of torch's threads
        bytes_: Any = (ctypes.c_ubyte * nbytes).from_buffer(raw)
        address = ctypes.addressof(bytes_)
        pinning: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = pinning.cudaHostRegister(address, nbytes, _PORTABLE)
        if int(status):
            raise LoadError(
                f"{nbytes} bytes of host memory cannot be pinned for {self._device}: {status}; "
                "lower max_host_bytes of parallel_shards"
            )
        owner = _Pinned()
        weakref.finalize(owner, _unpin, pinning, address, raw, os.getpid()).atexit = False
        bytes_.owner = owner
        return torch.frombuffer(bytes_, dtype=torch.uint8)

    def copy_bytes(self, to: int, source: int, size: int) -> None:
        """Submit a copy without letting other threads run: there is nothing to wait for.

        Raises:
            LoadError: the runtime refuses.
        """
        if status := self._memcpy(to, source, size, _HOST_TO_DEVICE, self._handle):
            raise LoadError(f"copying {size} bytes to {self._device} failed with CUDA error {status}")

    def copy(self, out: torch.Tensor, staged: torch.Tensor) -> None:
        """Put together what is spread out, and copy that; it is pageable, so torch waits for it."""
        with torch.cuda.stream(self._stream):
            out.copy_(staged.contiguous(), non_blocking=True)

    def mark(self) -> Mark:
        """Record an event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def follow(self) -> None:
        """Wait for the caller's current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """Make the caller's current stream wait."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Pinned:
    """What dies with the last tensor in pinned memory."""


def runtime() -> ctypes.PyDLL | None:
    """Return the CUDA runtime that torch has loaded, called without giving up the interpreter, if it has."""
    version = str(torch.version.cuda).partition(".")[0]
    try:
        found = ctypes.PyDLL(f"libcudart.so.{version}")
    except OSError:  # torch is made for something else, or has the runtime built in
        return None
    pointer = ctypes.c_void_p
    found.cudaMemcpyAsync.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer]
    return found


def _unpin(pinning: Any, address: int, raw: mmap.mmap, process: int) -> None:
    """Unpin memory, and only then let go of it; a forked child has none of it."""
    if os.getpid() == process:
        pinning.cudaHostUnregister(address)
    del raw
