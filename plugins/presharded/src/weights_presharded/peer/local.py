# SPDX-License-Identifier: Apache-2.0
"""Within one host: descriptors of the source's memory are mapped read-only, and copied from.

Host memory is sealed, so nothing changes it while it is read, and it stays when its source dies.
Device memory is mapped by the peer's own device and comes over NVLink, each segment in large blocks,
and is verified by sums that are computed while the next block is on its way.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from weights_core.arena import Segment
from weights_core.backing import Backing, HostBacking, backing_of
from weights_core.errors import ArenaError
from weights_core.memory import sealed
from weights_core.wire import MAX_FDS
from weights_presharded.peer import devices
from weights_presharded.peer.client import Connection, PeerError
from weights_presharded.peer.copying import Check, Copy, Pool, Pulse, checks
from weights_presharded.peer.transport import Fetch, Grantor, Transport

if TYPE_CHECKING:
    from weights_presharded.peer.offer import Offer

_MAX_DESCRIBED = 1 << 30


class LocalGrantor(Grantor):
    """Hands over the description and the memory as descriptors."""

    name = "local"

    def __init__(self) -> None:
        self._described: int | None = None

    def grant(self, offer: Offer) -> tuple[dict[str, Any], list[int]]:
        """Return the kind of memory and the descriptors."""
        if len(offer.segments) >= MAX_FDS:
            raise ArenaError(f"{len(offer.segments)} segments; at most {MAX_FDS - 1} can be handed over")
        if self._described is None:
            self._described = sealed(offer.described(), "weights-offer")
        told = {"memory": offer.memory, "device": offer.device}
        return told, [self._described, *(segment.descriptor for segment in offer.segments)]

    def close(self) -> None:
        """Close the description."""
        described, self._described = self._described, None
        if described is not None:
            os.close(described)


class LocalTransport(Transport):
    """Maps and copies."""

    name = "local"

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def described(self, connection: Connection) -> bytes:
        """Read the sealed description that came first."""
        if not connection.fds:
            raise PeerError("handed over no memory")
        size = os.fstat(connection.fds[0]).st_size
        if size > _MAX_DESCRIBED:
            raise PeerError(f"describes its weights by {size:,} bytes: refused")
        return os.pread(connection.fds[0], size, 0)

    def fetch(self, fetch: Fetch) -> None:
        """Map the source's memory and copy all of it."""
        kind = fetch.connection.told.get("memory")
        if len(fetch.connection.fds) != len(fetch.manifest.sizes) + 1:
            raise PeerError("handed over another number of segments than it describes")
        if kind == "host":
            self._from_host(fetch, list(self._attached(fetch, HostBacking())))
        elif kind == "cuda" and fetch.device.startswith("cuda"):
            self.wrote = True
            devices.copy(fetch, self._attached(fetch, backing_of(fetch.device)), _pulse(fetch))
        else:
            raise PeerError(f"has its weights in {kind} memory, which {fetch.device} can't take")

    def _attached(self, fetch: Fetch, backing: Backing) -> Iterator[Segment]:
        """Map one segment of the source after another; they stay mapped until the pull is over."""
        for size in fetch.manifest.sizes:
            segment = backing.attach(fetch.connection.fds.pop(1), size, private=False)
            segment.close()  # the mapping stays
            self._segments.append(segment)
            yield segment

    def _from_host(self, fetch: Fetch, segments: Sequence[Segment]) -> None:
        landing = fetch.landing
        pulse = _pulse(fetch)
        pool = Pool(fetch.threads)
        on_host = all(run.out.device.type == "cpu" for run in landing.runs)
        before = fetch.verify and (landing.in_place or not on_host)
        if before:  # what is sealed stays so, and nothing is written that would be found wrong
            pool.verify(checks(fetch.manifest, lambda key: segments[key[0]].address + key[1]), pulse)
        self.wrote = True
        if not on_host:
            for run in landing.runs:
                run.out.copy_(segments[run.segment].tensor(run.start, run.nbytes))
                pulse()
            return
        due: dict[int, list[Check]] = {}
        if fetch.verify and not before:
            starts = [run.out.data_ptr() for run in landing.runs]
            order = sorted(range(len(starts)), key=starts.__getitem__)
            starts.sort()
            for check in checks(fetch.manifest, lambda key: landing.flats[key].data_ptr()):
                index = order[bisect.bisect_right(starts, check.address) - 1]
                due.setdefault(index, []).append(check)
        pool.copy(
            (
                Copy(segments[r.segment].address + r.start, r.out.data_ptr(), r.nbytes, due.get(index, ()))
                for index, r in enumerate(landing.runs)
            ),
            pulse,
        )


def _pulse(fetch: Fetch) -> Pulse:
    """Tell the source that its target lives; if it has died, its memory is here all the same."""

    def alive() -> None:
        with contextlib.suppress(PeerError):
            fetch.connection.alive()

    return Pulse(alive)
