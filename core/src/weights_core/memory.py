# SPDX-License-Identifier: Apache-2.0
"""Host memory that processes share by a file descriptor, and mappings that live as long as their views.

Memory comes from `memfd_create`. Its writer maps it, fills it, and seals it: the same addresses are
mapped read-only in one step, under tensors that live there, and from then on the kernel refuses every
write, by anyone. What others get is a descriptor that was opened for reading.

Python's `mmap` cannot map at a given address, and its `close` under a live tensor ends the process,
so the mappings are made through the C library, and each is owned by the tensors in it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

from weights_core import live
from weights_core.errors import ArenaError
from weights_core.machine import memory_available

if TYPE_CHECKING:
    import torch

PAGE = mmap.PAGESIZE
Access = Literal["read", "private", "write"]
"""`read`: shared and read-only. `private`: what is written is copied first. `write`: shared."""

_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEAL, _SHRINK, _GROW, _WRITE = 1, 2, 4, 8
_ALL_SEALS = _SEAL | _SHRINK | _GROW | _WRITE
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_DONTFORK, _DOFORK, _HUGEPAGE, _COLLAPSE = 10, 11, 14, 25
HUGE = 2 << 20
"""Bytes of a huge page; mappings that are larger begin where one could."""
_FAILED = ctypes.c_void_p(-1).value
_SEAL_ATTEMPTS = 50
_SPARE = 64 << 20
"""Bytes left to the rest of the process when memory is about to be used up."""


class Mapping:
    """A range of addresses onto a file descriptor's bytes; unmapped when nothing refers to it."""

    def __init__(self, fd: int, nbytes: int, access: Access) -> None:
        """Map `nbytes` from the start of `fd`.

        Raises:
            ArenaError: the kernel refuses, e.g. for want of address space.
        """
        self.nbytes = nbytes
        self.length = _pages(nbytes)
        reserved = _aligned(self.length)
        try:
            self.address = _mmap(reserved, self.length, fd, access)
        except BaseException:
            if reserved is not None:
                libc().munmap(reserved, self.length)
            raise
        if access == "write":
            _advise(self.address, self.length, _HUGEPAGE)
            _advise(self.address, self.length, _DONTFORK)  # a child's copy would forbid sealing
        owner = _Owner()
        weakref.finalize(owner, libc().munmap, self.address, self.length).atexit = False
        memory: Any = (ctypes.c_ubyte * self.length).from_address(self.address)
        memory.owner = owner  # tensors keep the buffer, which keeps this
        self._memory = memory

    def replace(self, fd: int, access: Access) -> None:
        """Map the same addresses anew, in one step, under whatever lives there.

        Raises:
            ArenaError: the kernel refuses; the old mapping stays.
        """
        _mmap(self.address, self.length, fd, access)

    def vacate(self) -> None:
        """Keep the addresses and nothing behind them."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        if libc().mmap(self.address, self.length, _PROT_NONE, flags, -1, 0) != self.address:
            raise ArenaError(f"the mapping cannot be given up: {os.strerror(ctypes.get_errno())}")

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor with a storage of its own, which keeps the mapping alive.

        Raises:
            ValueError: not within the mapping.
        """
        import torch

        if not 0 <= offset <= offset + nbytes <= self.length:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not in a mapping of {self.length}")
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=offset)


class _Owner:
    """What dies with the last tensor in a mapping."""


class HostSegment:
    """A piece of shared host memory: a memfd and one mapping of it.

    `descriptor` is what others are handed: it can only be read from. A segment owns it until `close`,
    which leaves the mapping to the tensors in it.
    """

    def __init__(
        self,
        descriptor: int,
        mapping: Mapping,
        *,
        writable: int | None = None,
        sealed_access: Access = "read",
    ) -> None:
        self.descriptor = descriptor
        self.mapping = mapping
        self._writable = writable
        self._sealed_access: Access = sealed_access
        self._close = weakref.finalize(
            self, _close_all, [descriptor] + ([] if writable is None else [writable])
        )
        live.add(self)

    @classmethod
    def create(cls, nbytes: int, sealed_access: Access = "read") -> HostSegment:
        """Make memory to be filled. It takes none until it is written; see `check_room`.

        Once sealed it can be read here; with `private` access also written, into copies of its own.

        Raises:
            ArenaError: a limit on file sizes, descriptors or address space forbids it.
        """
        fds: list[int] = []
        try:
            fds.append(os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(fds[0], _pages(nbytes))
            fds.append(os.open(f"/proc/self/fd/{fds[0]}", os.O_RDONLY | os.O_CLOEXEC))
            return cls(fds[1], Mapping(fds[0], nbytes, "write"), writable=fds[0], sealed_access=sealed_access)
        except OSError as exc:
            _close_all(fds)
            raise _no_room(nbytes, exc) from exc
        except BaseException:
            _close_all(fds)
            raise

    @classmethod
    def attach(cls, descriptor: int, nbytes: int, access: Access = "read") -> HostSegment:
        """Map memory that another process sealed. Takes over `descriptor`, also if it fails.

        Raises:
            ArenaError: it is no sealed memory, or smaller than `nbytes`.
        """
        try:
            _check_sealed(descriptor, nbytes)
            return cls(descriptor, Mapping(descriptor, nbytes, access), sealed_access=access)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def sealed(self) -> bool:
        """Whether the kernel refuses every further write."""
        return self._writable is None

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""
        return self.mapping.address

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        return self.mapping.nbytes

    @property
    def is_open(self) -> bool:
        """Whether it is sealed, and its descriptor not closed."""
        return self.sealed and self._close.alive

    @property
    def is_settled(self) -> bool:
        """Whether nobody can write what is mapped here, not even into copies of its own."""
        return self.sealed and self._sealed_access == "read"

    def again(self) -> HostSegment:
        """Return the same mapping with a descriptor of its own."""
        return HostSegment(os.dup(self.descriptor), self.mapping, sealed_access=self._sealed_access)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes as a flat uint8 tensor; see `Mapping.tensor`."""
        return self.mapping.tensor(offset, nbytes)

    def fitted(self, used: int) -> int:
        """Return `used`: what is beyond is cut off."""
        return used

    def seal(self, nbytes: int) -> None:
        """Cut to `nbytes` and make the memory read-only for ever, under the tensors that live in it.

        Raises:
            ArenaError: another mapping can still write, or a device still has the pages.
        """
        if self._writable is None:
            return
        os.ftruncate(self._writable, _pages(nbytes))
        self.mapping.replace(self.descriptor, self._sealed_access)
        for attempt in range(_SEAL_ATTEMPTS):
            try:
                fcntl.fcntl(self._writable, _ADD_SEALS, _ALL_SEALS)
                break
            except OSError as exc:
                if exc.errno != errno.EBUSY or attempt == _SEAL_ATTEMPTS - 1:
                    raise ArenaError(
                        f"the memory cannot be sealed: {exc.strerror}; something still holds it for writing"
                    ) from exc
                time.sleep(0.01)  # the kernel gives up its own references to the pages a little later
        self.mapping.nbytes = nbytes
        writable, self._writable = self._writable, None
        self._close.detach()
        self._close = weakref.finalize(self, _close_all, [self.descriptor])
        os.close(writable)

    def sleep(self) -> None:
        """Give up the memory and the descriptor; whoever touches the addresses before `wake` is killed.

        Raises:
            ArenaError: the memory was not sealed.
        """
        if self._writable is not None:
            raise ArenaError("memory that is being filled cannot be given up")
        self.mapping.vacate()
        self.close()

    def wake(self, descriptor: int, nbytes: int) -> None:
        """Map the memory of `descriptor` at the addresses that were kept; takes over the descriptor.

        Raises:
            ArenaError: as `attach`.
        """
        try:
            _check_sealed(descriptor, nbytes)
            self.mapping.replace(descriptor, self._sealed_access)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        self._close = weakref.finalize(self, _close_all, [descriptor])

    def close(self) -> None:
        """Close the descriptors; idempotent. The tensors keep their memory."""
        if self._writable is not None:  # it will never be sealed, so children may have it
            _advise(self.mapping.address, self.mapping.length, _DOFORK)
        self._close()


def sealed(raw: bytes, name: str) -> int:
    """Return a descriptor of memory that holds `raw` and can never be changed; `name` is for people."""
    writable = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < len(raw):
            done += os.write(writable, raw[done:])
        fcntl.fcntl(writable, _ADD_SEALS, _ALL_SEALS)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def check_room(nbytes: int) -> None:
    """Refuse to fill `nbytes` of host memory that is not there: memfd reserves nothing.

    Raises:
        ArenaError: saying how much there is.
    """
    room = memory_available()
    if nbytes + _SPARE > room:
        raise ArenaError(
            f"{nbytes / 1e9:,.2f} GB of host memory are needed, and {room / 1e9:,.2f} GB are available "
            "(MemAvailable, and the limits of control groups)"
        )


def _check_sealed(descriptor: int, nbytes: int) -> None:
    seals = _seals(descriptor)
    if seals is None or seals & _ALL_SEALS != _ALL_SEALS:
        raise ArenaError("the descriptor is of memory that could still be changed or cut: refused")
    size = os.fstat(descriptor).st_size
    if size < nbytes:
        raise ArenaError(f"the shared memory has {size:,} bytes, the manifest says {nbytes:,}")


def _seals(descriptor: int) -> int | None:
    try:
        return fcntl.fcntl(descriptor, _GET_SEALS)
    except OSError:
        return None


def _pages(nbytes: int) -> int:
    return max(1, -(-nbytes // PAGE)) * PAGE


def collapse(address: int, nbytes: int) -> bool:
    """Have the kernel put a mapped range of shared memory into huge pages; say whether it did.

    Where the system's settings make none for shared memory, this does all the same. It takes about a
    second for a GiB, and from then on every process maps the range five hundred times faster.
    """
    first = -(-address // HUGE) * HUGE
    last = (address + nbytes) // HUGE * HUGE
    return last > first and libc().madvise(first, last - first, _COLLAPSE) == 0


def _aligned(length: int) -> int | None:
    """Return addresses that are kept for a mapping, so that huge pages fit into it; None for a small one."""
    if length < HUGE:
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    found = libc().mmap(None, length + HUGE, _PROT_NONE, flags, -1, 0)
    if found in (None, _FAILED):
        return None  # mapping it will say why
    address = -(-found // HUGE) * HUGE
    if address > found:
        libc().munmap(found, address - found)
    if (found + length + HUGE) > address + length:
        libc().munmap(address + length, found + HUGE - address)
    return int(address)


def _mmap(address: int | None, length: int, fd: int, access: Access) -> int:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if access != "read" else 0)
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if access == "private" else mmap.MAP_SHARED
    fixed = _MAP_FIXED if address is not None else 0
    found = libc().mmap(address, length, protection, flags | fixed, fd, 0)
    if found in (None, _FAILED):
        why = os.strerror(ctypes.get_errno())
        raise ArenaError(f"{length:,} bytes cannot be mapped: {why}")
    return int(found)


def _advise(address: int, length: int, advice: int) -> None:
    libc().madvise(address, length, advice)  # a hint: kernels without it do without


def _no_room(nbytes: int, exc: OSError) -> ArenaError:
    cause = {
        errno.EFBIG: "the limit on file sizes (ulimit -f) is lower",
        errno.EMFILE: "too many open files (ulimit -n)",
    }.get(exc.errno or 0, exc.strerror)
    return ArenaError(f"{nbytes:,} bytes of shared memory cannot be had: {cause}")


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library, with the calls used here typed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
