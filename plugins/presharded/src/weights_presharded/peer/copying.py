# SPDX-License-Identifier: Apache-2.0
"""Copy host memory by several threads, and hash what was copied while it is in their caches."""

from __future__ import annotations

import ctypes
import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import attrs

from weights_core.arena import Manifest
from weights_presharded.peer.client import PeerError
from weights_presharded.peer.hashing import Hasher, batched

PIECE = 1 << 20
"""Bytes copied at a time where they are hashed too: a core's cache holds them."""
SPLIT = 16 << 20
"""Bytes that one thread copies where nothing is hashed, so that all have something to do to the end."""
_PULSE = 1.0


@attrs.frozen
class Check:
    """A tensor's bytes here, and the digest that they must have."""

    name: str
    address: int
    nbytes: int
    digest: str


@attrs.frozen
class Copy:
    """Bytes to copy, of which `checks` are to be verified; addresses of checks are the destination's."""

    source: int
    out: int
    nbytes: int
    checks: Sequence[Check] = ()


class Pool:
    """Threads for one transfer. A caller that waits is told once a second, and can end it."""

    def __init__(self, threads: int) -> None:
        self._threads = max(1, threads)
        self._stop = threading.Event()

    def copy(self, copies: Iterable[Copy], pulse: Callable[[], None]) -> None:
        """Copy and check everything, the largest first.

        Raises:
            PeerError: a tensor's digest is another; names it.
        """
        jobs = batched(sorted(_split(copies), key=_nbytes, reverse=True), _nbytes)
        self._each(jobs, self._copy_all, pulse)

    def verify(self, checks: Iterable[Check], pulse: Callable[[], None]) -> None:
        """Check bytes that are here already.

        Raises:
            PeerError: as `copy`.
        """
        jobs = batched(sorted(checks, key=_nbytes, reverse=True), _nbytes)
        self._each(jobs, self._verify_all, pulse)

    def _each(
        self, jobs: Sequence[Sequence[object]], do: Callable[..., None], pulse: Callable[[], None]
    ) -> None:
        with ThreadPoolExecutor(self._threads, thread_name_prefix="weights-copy") as pool:
            waiting: set[Future[None]] = {pool.submit(do, job) for job in jobs}
            try:
                while waiting:
                    done, waiting = wait(waiting, _PULSE, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if waiting:
                        pulse()
            except BaseException:
                self._stop.set()
                for future in waiting:
                    future.cancel()
                raise

    def _copy_all(self, copies: Sequence[Copy]) -> None:
        for one in copies:
            if self._stop.is_set():
                return
            if one.checks:
                self._copy_checked(one)
            else:
                ctypes.memmove(one.out, one.source, one.nbytes)

    def _copy_checked(self, copy: Copy) -> None:
        """Copy piece by piece, feeding the digest of a tensor that is all of it."""
        whole = len(copy.checks) == 1 and copy.checks[0].nbytes == copy.nbytes
        hasher = Hasher()
        for start in range(0, copy.nbytes, PIECE):
            if self._stop.is_set():
                return
            size = min(PIECE, copy.nbytes - start)
            ctypes.memmove(copy.out + start, copy.source + start, size)
            if whole:
                hasher.update(copy.out + start, size)
        if whole:
            _compare(copy.checks[0], hasher)
        else:
            self._verify_all(copy.checks)

    def _verify_all(self, checks: Sequence[Check]) -> None:
        for check in checks:
            hasher = Hasher()
            for start in range(0, check.nbytes, PIECE):
                if self._stop.is_set():
                    return
                hasher.update(check.address + start, min(PIECE, check.nbytes - start))
            _compare(check, hasher)


def checks(manifest: Manifest, address: Callable[[tuple[int, int, int]], int]) -> list[Check]:
    """Return what is to be checked of the tensors at `address((segment, offset, span))`, each place once.

    Raises:
        PeerError: a tensor has no digest.
    """
    found: dict[tuple[int, int, int], Check] = {}
    for place in manifest.places.values():
        key = (place.segment, place.offset, place.span)
        if place.span and key not in found:
            due = manifest.digests.get(place.name)
            if due is None:
                raise PeerError(f"gives no digest of tensor {place.name!r}")
            found[key] = Check(place.name, address(key), place.span, due)
    return list(found.values())


class Pulse:
    """Tell the source now and then that its target lives; called often, it does so once a second."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive = alive
        self._next = time.monotonic() + _PULSE

    def __call__(self) -> None:
        """Tell it, if a second has passed."""
        if time.monotonic() >= self._next:
            self._alive()
            self._next = time.monotonic() + _PULSE


def _compare(check: Check, hasher: Hasher) -> None:
    if hasher.value != check.digest:
        raise PeerError(
            f"tensor {check.name!r} arrived with the digest {hasher.value}, the source said {check.digest}"
        )


def _split(copies: Iterable[Copy]) -> Iterable[Copy]:
    for copy in copies:
        if copy.checks or copy.nbytes <= SPLIT:
            yield copy
            continue
        for start in range(0, copy.nbytes, SPLIT):
            yield Copy(copy.source + start, copy.out + start, min(SPLIT, copy.nbytes - start))


_nbytes: Callable[[Copy | Check], int] = operator.attrgetter("nbytes")
