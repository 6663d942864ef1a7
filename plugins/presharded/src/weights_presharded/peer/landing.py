# SPDX-License-Identifier: Apache-2.0
"""Where weights land: memory of their own that the engine then binds, or the engine's own parameters."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from weights_core import dtypes
from weights_core.arena import ALIGNMENT, ArenaWriter, Manifest, Place
from weights_core.tensors import allocate
from weights_core.types import TensorMeta

if TYPE_CHECKING:
    import torch

    from weights_core import Engine


@attrs.frozen(eq=False)
class Run:
    """A range of a source's segment, and the bytes here where it is to be: flat, of type uint8."""

    segment: int
    start: int
    out: torch.Tensor

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.out.numel()


@attrs.frozen(eq=False)
class Odd:
    """A tensor whose elements lie in another order here: they come to `flat`, and are put in order."""

    flat: torch.Tensor
    place: Place
    out: torch.Tensor


Key = tuple[int, int, int]
"""Segment, offset and span of a place."""


@attrs.frozen(eq=False)
class Landing:
    """Where everything goes: every place's bytes are in `flats`, which are parts of the runs.

    `writer` holds the memory if it is such as can be served from again. `whole`: each run is all that is used
    of a segment.
    """

    runs: Sequence[Run]
    flats: Mapping[Key, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    odds: Sequence[Odd] = ()
    in_place: bool = False
    whole: bool = False
    writer: ArenaWriter | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that come."""
        return sum(run.nbytes for run in self.runs)

    def finish(self) -> None:
        """Put in order what lies in another one here."""
        for odd in self.odds:
            odd.out.copy_(shaped(odd.flat, odd.place))


def ranges(manifest: Manifest) -> list[tuple[int, int, int]]:
    """Return the ranges (segment, start, end) that tensors lie in; those that overlap are one."""
    found: list[tuple[int, int, int]] = []
    for place in sorted(manifest.places.values(), key=lambda p: (p.segment, p.offset)):
        end = place.offset + place.span
        if found and found[-1][0] == place.segment and place.offset < found[-1][2]:
            segment, start, last = found[-1]
            found[-1] = (segment, start, max(last, end))
        elif place.span:
            found.append((place.segment, place.offset, end))
    return found


def extents(manifest: Manifest) -> list[int]:
    """Return how many bytes of each segment are used, counted in whole regions."""
    ends = [0] * len(manifest.sizes)
    for place in manifest.places.values():
        ends[place.segment] = max(ends[place.segment], place.offset + place.span)
    rounded = (-(-end // ALIGNMENT) * ALIGNMENT for end in ends)
    return [min(size, end) for size, end in zip(manifest.sizes, rounded, strict=True)]


def in_own_memory(
    manifest: Manifest, writer: ArenaWriter | None, device: str, *, whole_segments: bool
) -> Landing:
    """Take memory for what `manifest` says, in the same order.

    Args:
        manifest: the source's.
        writer: where to take it from, so that it can be served from again; else it is plain memory.
        device: where plain memory is to be.
        whole_segments: take what is used of each segment as one piece, to be copied at once.

    Raises:
        ArenaError: there is none.
    """
    take = _from_writer(writer) if writer is not None else plain(device)
    used = [(i, 0, size) for i, size in enumerate(extents(manifest)) if size]
    wanted = used if whole_segments else ranges(manifest)
    runs = [Run(segment, start, take(end - start)) for segment, start, end in wanted]
    begins = [(run.segment, run.start) for run in runs]
    empty = take(0)
    flats, tensors = {}, {}
    for place in manifest.places.values():
        flat = empty
        if place.span:
            run = runs[bisect.bisect_right(begins, (place.segment, place.offset)) - 1]
            flat = flats[_key(place)] = run.out.narrow(0, place.offset - run.start, place.span)
        tensors[place.name] = shaped(flat, place)
    return Landing(runs, flats, tensors, whole=whole_segments, writer=writer)


def in_parameters(manifest: Manifest, engine: Engine) -> Landing:
    """Take the engine's own parameters, which have memory; each place of memory is filled once."""
    import torch

    tensors = engine.tensors(manifest.layout)
    runs: list[Run] = []
    odds: list[Odd] = []
    flats: dict[Key, torch.Tensor] = {}
    for place in manifest.places.values():
        if not place.span or _key(place) in flats:
            continue
        out = tensors[place.name].detach()
        if place.span == place.meta.nbytes and tuple(out.stride()) == place.strides:
            flat = out.as_strided((out.numel(),), (1,)).view(torch.uint8)
        else:
            flat = torch.empty(place.span, dtype=torch.uint8, device=out.device)
            odds.append(Odd(flat, place, out))
        flats[_key(place)] = flat
        runs.append(Run(place.segment, place.offset, flat))
    runs.sort(key=lambda run: (run.segment, run.start))
    return Landing(runs, flats, {n: tensors[n] for n in manifest.places}, odds, in_place=True)


def has_memory(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every tensor has memory of its own to be filled."""
    return bool(tensors) and not any(tensor.is_meta for tensor in tensors.values())


def _key(place: Place) -> Key:
    return place.segment, place.offset, place.span


def shaped(flat: torch.Tensor, place: Place) -> torch.Tensor:
    """Return bytes as the tensor that a place describes."""
    return flat.view(dtypes.to_torch(place.dtype)).as_strided(place.shape, place.strides)


def _from_writer(writer: ArenaWriter) -> Callable[[int], torch.Tensor]:
    return lambda nbytes: writer.alloc(TensorMeta("", (nbytes,), "U8", nbytes))


def plain(device: str) -> Callable[[int], torch.Tensor]:
    """Return what takes memory that is nobody's yet, flat, of type uint8."""
    if device.partition(":")[0] == "cpu":
        return allocate
    import torch

    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device)
