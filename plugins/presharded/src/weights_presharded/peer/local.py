# SPDX-License-Identifier: Apache-2.0
"""Within one host: descriptors of the source's memory are mapped read-only, and copied from.

Host memory is sealed, so nothing changes it while it is read, and it stays when its source dies.
Device memory is mapped by the peer's own device and comes over NVLink, each segment in large blocks,
and is verified by sums that are computed while the next block is on its way.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from weights_core import coverage
from weights_core.arena import Segment
from weights_core.backing import Backing, HostBacking, backing_of
from weights_core.errors import ArenaError
from weights_core.memory import sealed
from weights_core.wire import MAX_FDS
from weights_presharded.peer import hashing
from weights_presharded.peer.client import Connection, PeerError
from weights_presharded.peer.copying import Check, Copy, Pool, Pulse, checks
from weights_presharded.peer.transport import Fetch, Grantor, Transport

if TYPE_CHECKING:
    import torch

    from weights_core.arena import Manifest
    from weights_presharded.peer.landing import Landing, Run
    from weights_presharded.peer.offer import Offer

_MAX_DESCRIBED = 1 << 30
CHUNK = 256 << 20
"""Bytes of a device's segment that are copied at a time where they are verified meanwhile."""


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
            self._from_host(fetch, _mapped(fetch, HostBacking()))
        elif kind == "cuda" and fetch.device.startswith("cuda"):
            self.wrote = True
            _from_device(fetch, _mapped(fetch, backing_of(fetch.device)))
        else:
            raise PeerError(f"has its weights in {kind} memory, which {fetch.device} can't take")

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


def _mapped(fetch: Fetch, backing: Backing) -> list[Segment]:
    segments = []
    for size in fetch.manifest.sizes:
        segment = backing.attach(fetch.connection.fds.pop(1), size, private=False)
        segments.append(segment)
        segment.close()  # the mapping stays
    return segments


def _from_device(fetch: Fetch, segments: Sequence[Segment]) -> None:
    """Copy between devices in large blocks, on two streams in turn: one copies while the other sums.

    What goes into parameters comes to memory in between, so that it, too, comes in large blocks and
    what is verified is what is written.
    """
    import torch

    manifest, landing = fetch.manifest, fetch.landing
    pulse = _pulse(fetch)
    factors = hashing.multipliers(landing.runs[0].out.device) if landing.runs and fetch.verify else None
    found: list[list[torch.Tensor]] = [[] for _ in segments]
    lanes = Lanes(fetch.device)
    between = {} if landing.whole else {lane: _empty_like(landing, manifest) for lane in lanes.names}
    for index, (segment, size) in enumerate(zip(segments, manifest.sizes, strict=True)):
        source = segment.tensor(0, size)
        runs = [run for run in landing.runs if run.segment == index]
        for start in range(0, size, CHUNK):
            stop = min(size, start + CHUNK)
            with lanes.next() as lane:
                part = runs[0].out[start:stop] if landing.whole else between[lane][: stop - start]
                part.copy_(source[start:stop], non_blocking=True)
                if factors is not None:
                    found[index].append(hashing.block_sums(part, factors))
                if not landing.whole:
                    _spread(part, start, runs)
            pulse()
    lanes.join()
    if factors is not None:
        for index, sums in enumerate(found):
            compare_sums(fetch, index, torch.cat(sums).tolist())


def _spread(part: torch.Tensor, at: int, runs: Sequence[Run]) -> None:
    """Copy a block's bytes on to where they are to be."""
    import torch

    first = bisect.bisect_left(runs, at + 1, key=lambda run: run.start + run.nbytes)
    outs, sources = [], []
    for run in itertools.takewhile(lambda run: run.start < at + part.numel(), runs[first:]):
        begin, end = max(run.start, at), min(run.start + run.nbytes, at + part.numel())
        if begin < end:
            outs.append(run.out[begin - run.start : end - run.start])
            sources.append(part[begin - at : end - at])
    if outs:
        torch._foreach_copy_(outs, sources, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


def _empty_like(landing: Landing, manifest: Manifest) -> torch.Tensor:
    import torch

    size = min(CHUNK, max(manifest.sizes))
    return torch.empty(size, dtype=torch.uint8, device=landing.runs[0].out.device if landing.runs else "cpu")


def compare_sums(fetch: Fetch, segment: int, found: Sequence[int]) -> None:
    """Compare the sums of a segment's blocks with those that the source told.

    Raises:
        PeerError: they differ; names the tensors that lie there.
    """
    due = fetch.sums[segment] if segment < len(fetch.sums) else ()
    wrong = [i for i, (one, other) in enumerate(itertools.zip_longest(found, due)) if one != other]
    if wrong:
        low, high = wrong[0] * hashing.BLOCK, (wrong[0] + 1) * hashing.BLOCK
        names = [
            p.name
            for p in fetch.manifest.places.values()
            if p.segment == segment and p.offset < high and p.offset + p.span > low
        ]
        raise PeerError(
            f"{len(wrong)} blocks arrived other than the source said, of {coverage.listed(names)}"
        )


class Lanes:
    """Two streams of a device that are used in turn; on the host, none."""

    def __init__(self, device: str) -> None:
        import torch

        self.names = (0, 1)
        self._turn = itertools.cycle(self.names)
        self._device = device
        self._streams: list[Any] = []
        if torch.cuda.is_available():
            self._streams = [torch.cuda.Stream(device) for _ in self.names]  # type: ignore[no-untyped-call]
            for stream in self._streams:
                stream.wait_stream(torch.cuda.current_stream(device))

    @contextlib.contextmanager
    def next(self) -> Iterator[int]:
        """Have what is begun in the block run on the next stream."""
        import torch

        lane = next(self._turn)
        with torch.cuda.stream(self._streams[lane]) if self._streams else contextlib.nullcontext():
            yield lane

    def join(self) -> None:
        """Wait for both."""
        for stream in self._streams:
            stream.synchronize()
