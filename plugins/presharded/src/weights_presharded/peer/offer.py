# SPDX-License-Identifier: Apache-2.0
"""What a source offers: its tensors in memory that can be shared, and what tells every byte of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weights_core import Layout, live
from weights_core.arena import ArenaWriter, Manifest, Segment, Shared, padded
from weights_core.backing import Backing, HostBacking, backing_for
from weights_core.errors import PublishError
from weights_presharded.peer import hashing
from weights_presharded.peer.landing import extents
from weights_presharded.peer.ordinary import memory_to_serve

if TYPE_CHECKING:
    import torch

    from weights_core import Engine
    from weights_presharded.peer.gates import Serving


@attrs.frozen(eq=False, kw_only=True)
class Offer:
    """Tensors to serve. `manifest` says where each lies in the memory of `segments`.

    `index` is the device's number in this process. `sums` are those of each segment's blocks, where
    the memory is a device's; on the host the manifest has every tensor's digest. `nbytes` counts the
    tensors' bytes, `moved` those that were copied for this, `held` those that are kept beside what the
    engine itself needs.
    """

    layout: Layout
    manifest: Manifest
    segments: Sequence[Segment]
    memory: str
    device: str
    index: int
    nbytes: int
    moved: int
    held: int
    sums: Sequence[Sequence[int]] = ()

    def described(self) -> bytes:
        """Return the manifest and the sums, as they are sent."""
        return json.dumps({"manifest": self.manifest.dumps().decode(), "sums": self.sums}).encode()

    def close(self) -> None:
        """Close the descriptors; tensors of the engine keep their memory."""
        for segment in self.segments:
            segment.close()


def make_offer(
    engine: Engine,
    serving: Serving,
    writer: ArenaWriter | None,
    *,
    expected_bytes: int,
    threads: int,
    transport: str = "auto",
) -> Offer:
    """Bring an engine's tensors to where they can be served from, unless they are there.

    Host memory is mapped so that what the engine writes later is its own: a page that is written is
    copied. On a device nothing is protected, and whoever pulls finds a changed byte by its digest.

    Args:
        engine: holding the weights in the layout that `serving` names.
        serving: what to serve, and how.
        writer: memory that was filled from a peer, if it was.
        expected_bytes: bytes of the tensors, about.
        threads: how many hash at a time.
        transport: by which it is served, or `auto`.

    Raises:
        PublishError, ArenaError: they can't be served; says why.
    """
    layout = serving.layout
    tensors = _complete(engine, layout)
    home = memory_to_serve(backing_for(engine.info), transport, engine.info.device)
    copied = serving.how == "snapshot" and home.kind != "host"
    backing = HostBacking() if copied else home
    if writer is None or copied:
        shared = [] if copied else _shared_already(tensors, layout)
        writer = new_writer(backing, expected_bytes, shared)
    try:
        if copied:
            backing.check_room(expected_bytes)
            tensors = _copies(tensors, writer)
            moved = held = writer.nbytes
        else:
            backing.check_room(max(writer.outside(tensors).values(), default=0))
            moved, held = writer.move(tensors), 0
            tensors = _complete(engine, layout)
        manifest = writer.manifest(tensors, layout)
        backing.written()
        nbytes = sum(bytes_of(manifest).values())
        sums: list[list[int]] = []
        if backing.kind == "host":
            manifest = attrs.evolve(manifest, digests=_digests(manifest, writer.segments, threads))
            writer.seal()
        else:
            sums = segment_sums(manifest, writer.segments)
    except BaseException:
        writer.close()
        raise
    return Offer(
        layout=layout,
        manifest=manifest,
        segments=writer.segments,
        memory=backing.kind,
        device=backing.device,
        index=writer.segments[0].tensor(0, 1).device.index or 0,
        nbytes=nbytes,
        moved=moved,
        held=held,
        sums=sums,
    )


def new_writer(backing: Backing, nbytes: int, existing: Sequence[Shared] = ()) -> ArenaWriter:
    """Return memory to serve from: what is shared already, and none yet besides."""
    return ArenaWriter(lambda size: backing.create(size, private=backing.kind == "host"), nbytes, existing)


def _shared_already(tensors: Mapping[str, torch.Tensor], layout: Layout) -> list[Shared]:
    """Return the memory that an owner has put the weights in, so that they are not moved out of it.

    Before post-load a mapping that is private has not been written to; later it may have been.
    """
    addresses = [t.data_ptr() for t in tensors.values() if not t.is_meta and t.numel()]
    found = live.holding(addresses)
    return [segment.again() for segment in found if segment.is_settled or layout is Layout.SHARDED]


def bytes_of(manifest: Manifest) -> dict[tuple[int, int, int], int]:
    """Return the bytes of the elements at each place, names of one place counted once."""
    return {(p.segment, p.offset, p.span): p.meta.nbytes for p in manifest.places.values()}


def room_for(engine: Engine, layout: Layout) -> int:
    """Return the bytes that an engine's tensors take in memory to serve from."""
    return padded(engine.expected(layout).values())


def segment_sums(manifest: Manifest, segments: Sequence[Segment]) -> list[list[int]]:
    """Return the sums of the blocks of what is used of each segment."""
    device = segments[0].tensor(0, 1).device
    factors = hashing.multipliers(device)
    made = [
        hashing.block_sums(segment.tensor(0, used), factors)
        for segment, used in zip(segments, extents(manifest), strict=True)
    ]
    return [sums.tolist() for sums in made]


def read_described(raw: bytes) -> tuple[Manifest, list[list[int]]]:
    """Read what `Offer.described` returned, and believe nothing in it.

    Raises:
        ArenaError, ValueError: it is something else.
    """
    try:
        given: Any = json.loads(raw)
        manifest = Manifest.loads(given["manifest"].encode())
        sums = given["sums"]
        sound = isinstance(sums, list) and all(
            isinstance(row, list) and all(type(n) is int for n in row) for row in sums
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ValueError(f"is no offer: {type(exc).__name__}: {exc}") from exc
    if not sound:
        raise ValueError("is no offer: its sums are no numbers")
    return manifest, sums


def _complete(engine: Engine, layout: Layout) -> dict[str, torch.Tensor]:
    """Return exactly what another engine would expect, ties under each of their names."""
    tensors, expected = engine.tensors(layout), engine.expected(layout)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise PublishError(f"refusing to serve a model that is not filled: {missing[0]!r} is missing")
    return {name: tensors[name] for name in expected}


def _copies(tensors: Mapping[str, torch.Tensor], writer: ArenaWriter) -> dict[str, torch.Tensor]:
    """Copy tensors into the writer's memory; one storage becomes one region, so ties stay ties."""
    copies: dict[int, torch.Tensor] = {}
    made = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach()
        made[name] = copies[id(tensor)]
    writer.move(made)  # of views: the engine's own tensors stay where they are
    return made


def _digests(manifest: Manifest, segments: Sequence[Segment], threads: int) -> dict[str, str]:
    places = {(p.segment, p.offset, p.span) for p in manifest.places.values()}
    order = list(places)
    ranges = [(segments[segment].address + offset, span) for segment, offset, span in order]
    found = dict(zip(order, hashing.digests(ranges, threads), strict=True))
    return {p.name: found[p.segment, p.offset, p.span] for p in manifest.places.values()}
