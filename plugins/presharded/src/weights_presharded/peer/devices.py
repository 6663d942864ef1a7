# SPDX-License-Identifier: Apache-2.0
"""Copy from the memory of one device to that of another, and sum what came while more is coming."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from weights_core import coverage
from weights_core.arena import Segment
from weights_presharded.peer import hashing
from weights_presharded.peer.client import PeerError
from weights_presharded.peer.landing import extents

if TYPE_CHECKING:
    import torch

    from weights_presharded.peer.landing import Run
    from weights_presharded.peer.transport import Fetch

CHUNK = 256 << 20
"""Bytes of a segment that are copied at a time where they come to memory in between."""


def copy(fetch: Fetch, segments: Iterable[Segment], pulse: Callable[[], None]) -> None:
    """Copy every segment, one after another; what came is summed while the next is on its way.

    What goes into parameters comes to memory in between, so that it, too, comes in large pieces, and
    what is verified is what is written.

    Args:
        fetch: what is to be done.
        segments: the source's; the next is asked for while the last is being copied, so that it may
            be mapped meanwhile.
        pulse: is called now and then.

    Raises:
        PeerError: a block arrived other than the source said.
        ArenaError: a segment cannot be mapped.
    """
    landing = fetch.landing
    if not landing.runs:
        return
    device = landing.runs[0].out.device
    sizes = extents(fetch.manifest)
    factors = hashing.multipliers(device) if fetch.verify else None
    sums: list[list[torch.Tensor]] = [[] for _ in sizes]
    between = None if landing.whole else itertools.cycle(_buffers(min(CHUNK, max(sizes)), device))
    with Streams(fetch.device) as streams:
        for index, (size, segment) in enumerate(zip(sizes, segments, strict=True)):
            source = segment.tensor(0, size)
            runs = [run for run in landing.runs if run.segment == index]
            step = size if between is None else CHUNK
            for start in range(0, size, max(1, step)):
                stop = min(size, start + step)
                buffer = next(between) if between else None
                part = runs[0].out[start:stop] if buffer is None else buffer.memory[: stop - start]
                with streams.copying(buffer):
                    part.copy_(source[start:stop], non_blocking=True)
                with streams.working(buffer):
                    if factors is not None:
                        sums[index].append(hashing.block_sums(part, factors))
                    if buffer is not None:
                        _spread(part, start, runs)
                pulse()
    for index, found in enumerate(sums if fetch.verify else ()):
        compare(fetch, index, [one for part in found for one in part.tolist()])


def compare(fetch: Fetch, segment: int, found: Sequence[int]) -> None:
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


class Buffer:
    """Memory that a chunk comes to before it goes on; `free` is when it has gone on."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.free: Any = None


class Streams:
    """A device's stream that copies, and one that works on what was copied; on the host, none.

    Both are waited for at the end, also where it fails: memory may be given back then.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._streams: list[Any] = []
        if torch.cuda.is_available():
            self._streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
            for stream in self._streams:
                stream.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.synchronize()

    @contextlib.contextmanager
    def copying(self, into: Buffer | None) -> Iterator[None]:
        """Begin copies in the block, after what was in the buffer has gone on."""
        import torch

        if not self._streams:
            yield
            return
        if into is not None and into.free is not None:
            self._streams[0].wait_event(into.free)
        with torch.cuda.stream(self._streams[0]):
            yield

    @contextlib.contextmanager
    def working(self, on: Buffer | None) -> Iterator[None]:
        """Begin work in the block, after what has been copied so far."""
        import torch

        if not self._streams:
            yield
            return
        copying, working = self._streams
        working.wait_event(copying.record_event())
        with torch.cuda.stream(working):
            yield
        if on is not None:
            on.free = working.record_event()


def _buffers(nbytes: int, device: torch.device) -> list[Buffer]:
    import torch

    return [Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device)) for _ in range(2)]


def _spread(part: torch.Tensor, at: int, runs: Sequence[Run]) -> None:
    """Copy a chunk's bytes on to where they are to be."""
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
