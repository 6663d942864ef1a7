# SPDX-License-Identifier: Apache-2.0
"""Reads by the C library's own threads: POSIX asynchronous I/O, as glibc has it.

Threads of Python wait for each other to get the interpreter back after every read, which at tens of GB/s
takes longer than reading. glibc's need none. It serves requests on one descriptor one after the other, so
a file that is to be read in parallel needs several.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import weakref

_SIGEV_NONE = 1


def is_available() -> bool:
    """Return whether the C library is the one whose control blocks are known here."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except ValueError:
        return False
    return version is not None and ctypes.sizeof(ctypes.c_void_p) == 8


class _Request(ctypes.Structure):
    """A control block as glibc lays it out where pointers have 64 bits; its own fields are at the end."""

    _fields_ = (
        ("descriptor", ctypes.c_int),
        ("opcode", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("unused", ctypes.c_char * 48),
        ("queue", ctypes.c_void_p),
        ("state", ctypes.c_int * 3),
        ("result", ctypes.c_ssize_t),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_char * 32),
    )


_SIZE = ctypes.sizeof(_Request)


class Reads:
    """Up to `count` reads at a time, by number; used by one thread at a time."""

    def __init__(self, count: int) -> None:
        self._requests = (_Request * count)()
        self._base = ctypes.addressof(self._requests)
        self._pending: set[int] = set()
        self._refused: list[tuple[int, int]] = []
        self._calls = _calls()
        # the C library writes into requests until they are done, also when the interpreter is gone
        weakref.finalize(self, _drain, self._requests, self._pending, os.getpid())

    def submit(self, number: int, descriptor: int, address: int, nbytes: int, offset: int) -> None:
        """Begin to read `nbytes` from `offset` to `address`, which must stay until it is done."""
        request = self._requests[number]
        request.descriptor, request.buffer, request.nbytes = descriptor, address, nbytes
        request.offset, request.notify = offset, _SIGEV_NONE
        self._pending.add(number)  # first, so that one that is interrupted here is waited for
        if self._calls.read(self._base + number * _SIZE):
            self._pending.discard(number)
            self._refused.append((number, -ctypes.get_errno()))

    def done(self) -> list[tuple[int, int]]:
        """Return number and result of those that are done: bytes read, or a negative error number."""
        calls, base = self._calls, self._base
        done, self._refused = self._refused, []
        for number in tuple(self._pending):
            state = calls.error(base + number * _SIZE)
            if state != errno.EINPROGRESS:
                self._pending.discard(number)
                count = calls.result(base + number * _SIZE)
                done.append((number, -state if state else count))
        return done

    def wait(self) -> None:
        """Return when one is done, or a signal came."""
        _wait(self._base, self._pending)

    def drain(self) -> None:
        """Return when none is under way; what they read is lost."""
        _drain(self._requests, self._pending, os.getpid())


class _Calls:
    """The C library's functions; those that take no time are called without giving up the interpreter."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        quick = ctypes.PyDLL(None)
        pointer = ctypes.c_void_p
        self.read = self.libc.aio_read
        self.suspend = self.libc.aio_suspend
        self.error = quick.aio_error
        self.result = quick.aio_return
        self.read.argtypes = self.error.argtypes = self.result.argtypes = [pointer]
        self.result.restype = ctypes.c_ssize_t
        self.suspend.argtypes = [pointer, ctypes.c_int, pointer]


@functools.cache
def _calls() -> _Calls:
    return _Calls()


def _wait(base: int, pending: set[int]) -> None:
    if pending:
        array = (ctypes.c_void_p * len(pending))(*[base + number * _SIZE for number in pending])
        _calls().suspend(array, len(pending), None)


def _drain(requests: ctypes.Array[_Request], pending: set[int], process: int) -> None:
    if os.getpid() != process:
        return  # in a forked child they are nobody's
    base, calls = ctypes.addressof(requests), _calls()
    while pending:
        _wait(base, pending)
        for number in list(pending):
            if calls.error(base + number * _SIZE) != errno.EINPROGRESS:
                calls.result(base + number * _SIZE)
                pending.discard(number)
