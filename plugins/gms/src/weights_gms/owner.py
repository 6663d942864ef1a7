# SPDX-License-Identifier: Apache-2.0
"""Own an engine's weights: read a slot of the vault, or write it and offer it."""

from __future__ import annotations

import abc
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from weights_core import Identity, Layout, PublishReceipt, WeightSet, WeightSetWrapper
from weights_core.arena import ArenaSet, ArenaWriter, Manifest, Segment, padded
from weights_core.backing import Backing, backing_for
from weights_core.digest import checkpoint_digest
from weights_core.errors import EngineError, LoadError, PublishError, WeightsError
from weights_core.ranks import gather
from weights_gms.client import Ask, Endpoint, Grant, VaultError, commit, keep, open_slot, read_manifest
from weights_gms.holding import Holding

if TYPE_CHECKING:
    from weights_core import Engine, EngineInfo, LoadRequest, Source
    from weights_gms.plugin import GmsConfig

_Rank = tuple[str, str, dict[str, Any], str]
"""Group, slot, identity, and why there is none: what the ranks of an engine tell one another."""

log = logging.getLogger("weights.gms")


class Owner(abc.ABC):
    """What the plugin does with one load, whoever keeps the memory."""

    @abc.abstractmethod
    def load(self, source: Source) -> WeightSet:
        """Return shared weights, or those of `source` with the engine's parameters placed to be shared."""

    @abc.abstractmethod
    def publish(self, engine: Engine) -> PublishReceipt | None:
        """Offer what was written; None for a reader."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Let go of what only the load needed."""


class VaultOwner(Owner):
    """The vault's: a slot per rank, kept by the broker."""

    def __init__(self, config: GmsConfig, request: LoadRequest, engine: Engine, layout: Layout) -> None:
        self._config = config
        self._request = request
        self._engine: Engine | None = engine
        self._layout = layout
        self._backing: Backing = backing_for(request.engine)
        self._written: WritingSet | None = None

    def load(self, source: Source) -> WeightSet:
        """Ask the broker together with the other ranks, then read or write."""
        endpoint = endpoint_of(self._config)
        identity, found, ask = self._agree()
        grant = open_slot(endpoint, ask)
        try:
            if grant.kind == "read":
                return self._read(grant, identity, found)
            return self._write(grant, identity, found, source)
        except BaseException:
            grant.close()
            raise

    def publish(self, engine: Engine) -> PublishReceipt | None:
        """Move what is not there yet into the shared memory, seal it, and hand it to the broker."""
        written = self._written
        if written is None or written.closed:
            return None
        return written.offer(engine, self._layout)

    def finish(self) -> None:
        """Give up a grant that nothing was written for."""
        self._engine = None
        written, self._written = self._written, None
        if written is not None:
            written.loaded()

    # ------------------------------------------------------------------------------------------

    def _agree(self) -> tuple[Identity, str, Ask]:
        """Find this rank's slot and identity, and learn those of the others.

        Raises:
            LoadError: another rank could not, so that all fail rather than wait for it.
        """
        info, engine = self._request.engine, self._engine
        assert engine is not None
        world = info.topology.world

        def tell(mine: _Rank) -> Sequence[Any]:
            return gather(engine, self._request, mine, "asking for its slot") if world.size > 1 else [mine]

        try:
            digest, found = digest_of(self._config, self._request)
            identity = Identity.of(info, digest, self._layout)
        except WeightsError as exc:
            tell(("", "", {}, str(exc)))
            raise
        slot = slot_name(self._config.tag, self._backing.device, info)
        everyone = tell((uuid.uuid4().hex, slot, identity.as_dict(), ""))
        for rank, theirs in enumerate(everyone):
            if theirs[3]:
                raise LoadError(f"rank {rank} cannot ask for its slot: {theirs[3]}")
        ask = Ask(
            members=[(theirs[1], theirs[2]) for theirs in everyone],
            rank=world.rank,
            group=everyone[0][0],
            mode=self._config.mode,
            replace=self._config.replace,
            keep=self._config.keep,
            timeout=self._config.timeout,
        )
        return identity, found, ask

    def _read(self, grant: Grant, identity: Identity, found: str) -> WeightSet:
        if grant.reply["identity"] != identity.as_dict():
            raise LoadError("the broker handed over other weights than were asked for")
        manifest = Manifest.loads(read_manifest(grant))
        if manifest.layout is not self._layout or len(manifest.sizes) != len(grant.fds) - 1:
            raise LoadError("the broker handed over something else than its manifest says")
        private = self._request.engine.post_load_writes is not None and self._layout is Layout.SHARDED
        pieces: list[Segment] = []
        try:
            for size in manifest.sizes:
                piece = self._backing.attach(grant.fds.pop(1), size, private=private)
                pieces.append(piece)
            where = f"slot {grant.reply['slot']}, generation {grant.reply['number']}, of {grant.broker}"
            lease = keep(grant, pieces)
            holding = Holding(lease, pieces, manifest.sizes, grant.endpoint, self._backing, private=private)
        except BaseException:
            for piece in pieces:
                piece.close()
            raise

        def notes() -> tuple[str, ...]:
            return self._notes(f"read {where}", manifest.nbytes, found, pieces if private else ())

        return ReadSet(manifest, pieces, holding, notes)

    def _write(self, grant: Grant, identity: Identity, found: str, source: Source) -> WeightSet:
        engine = self._engine
        assert engine is not None
        info = self._request.engine
        inner = source.open()
        private = info.post_load_writes is not None and self._layout is Layout.SHARDED
        due = padded(engine.expected(self._layout).values())
        writer = ArenaWriter(lambda nbytes: self._backing.create(nbytes, private=private), due)
        try:
            filled = inner.layout is Layout.CHECKPOINT or inner.fills  # memory of the engine's own
            straight = filled and not inner.in_place
            if straight and self._layout is Layout.SHARDED:  # else post-load makes other tensors
                _place(engine, writer, self._backing)
        except BaseException:
            writer.close()
            inner.close()
            raise
        where = f"slot {grant.reply['slot']}, generation {grant.reply['number']}, of {grant.broker}"

        def notes(shared: int, own: Sequence[Segment]) -> tuple[str, ...]:
            return self._notes(f"wrote {where}", shared, found, own)

        offered = {
            "identity": identity.as_dict(),
            "keep": self._config.keep,
            "detail": {
                "memory": self._backing.kind,
                "pid": os.getpid(),
                "checkpoint": str(self._request.checkpoint),
            },
        }
        self._written = WritingSet(inner, grant, writer, offered, self._backing, private, notes, where)
        return self._written

    def _notes(self, what: str, shared: int, found: str, private: Sequence[Segment]) -> tuple[str, ...]:
        own = self._backing.private_bytes(private) if private else 0
        return (
            f"gms: {what}; {shared / 1e6:,.1f} MB shared, {own / 1e6:,.1f} MB of it copied for this engine",
            f"gms: the weights' digest is {found}",
        )


class Sleeping:
    """What an owner's set can do while its lease lasts: `report.lease.owned.sleep()`."""

    holding: Holding | None = None

    def sleep(self) -> None:
        """Give up the memory, and keep its addresses; see `Holding.sleep`."""
        self._held().sleep()

    def wake(self, timeout: float = 60.0) -> None:
        """Map the same generation again at the same addresses; see `Holding.wake`."""
        self._held().wake(timeout)

    def _held(self) -> Holding:
        if self.holding is None:
            raise VaultError("nothing was shared, so there is nothing to give up")
        return self.holding


class ReadSet(Sleeping, ArenaSet):
    """What a reader is given."""

    def __init__(
        self,
        manifest: Manifest,
        segments: Sequence[Segment],
        holding: Holding,
        notes: Callable[[], tuple[str, ...]],
    ) -> None:
        super().__init__(manifest, segments, provider="gms", notes=notes, on_close=holding.close)
        self.holding = holding


class WritingSet(Sleeping, WeightSetWrapper):
    """What a writer loads: the set of the sources below, which goes to where all can read it.

    Until it is offered the grant is given up by `close`; afterwards `close` ends the lease.
    """

    def __init__(
        self,
        inner: WeightSet,
        grant: Grant,
        writer: ArenaWriter,
        offered: Mapping[str, Any],
        backing: Backing,
        private: bool,
        notes: Callable[[int, Sequence[Segment]], tuple[str, ...]],
        where: str,
    ) -> None:
        super().__init__(inner)
        self.provider = "gms"
        self.closed = False
        self._below = inner.provider
        self._grant = grant
        self._writer: ArenaWriter | None = writer
        self._offered = offered
        self._private = private
        self._backing = backing
        self._own_notes = notes
        self._copied: Sequence[Segment] = ()
        self._where = where

    def __getattr__(self, name: str) -> Any:
        """Give engines what a wrapper's set offers beyond a `WeightSet`."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the set below, and which slot was written."""
        return (
            *self.inner.notes,
            f"gms: loaded by {self._below}",
            *(self._own_notes(self.holding.nbytes, self._copied) if self.holding else ()),
        )

    def offer(self, engine: Engine, layout: Layout) -> PublishReceipt:
        """Seal the engine's weights and hand them to the broker.

        Raises:
            PublishError, ArenaError, VaultError: they cannot be shared; this engine alone has them.
        """
        writer = self._writer
        assert writer is not None
        try:
            tensors = engine.tensors(layout)
            missing = [name for name in engine.expected(layout) if name not in tensors]
            if missing:
                raise PublishError(f"refusing to share a model that is not filled: {missing[0]!r} is missing")
            self._backing.check_room(max(writer.outside(tensors).values(), default=0))
            moved = writer.move(tensors)
            manifest = writer.manifest(engine.tensors(layout), layout)
            self._backing.written()
            writer.seal()
            nbytes = manifest.nbytes
            pieces = writer.segments
            lease = commit(self._grant, manifest.dumps(), pieces, {**self._offered, "nbytes": nbytes})
            self.holding = Holding(
                lease, pieces, manifest.sizes, self._grant.endpoint, self._backing, private=self._private
            )
        except BaseException:
            self.close()
            raise
        self._copied = pieces if self._private else ()
        log.info("offered %.1f MB as %s, %.1f MB of them moved", nbytes / 1e6, self._where, moved / 1e6)
        return PublishReceipt(layout=layout, nbytes=nbytes, detail=self._where)

    def loaded(self) -> None:
        """Let go of what only writing needed; give up the grant if nothing was offered."""
        self._writer = None
        if self.holding is None:
            self.close()

    def close(self) -> None:
        """Close the set below, and end the lease or give up the grant; idempotent."""
        if self.closed:
            return
        self.closed = True
        self._copied = ()  # whoever still has the set is not to keep the memory
        try:
            self.inner.close()
        finally:
            if self.holding is not None:
                self.holding.close()
            else:
                if self._writer is not None:
                    self._writer.close()
                    self._writer = None
                self._grant.close()


def digest_of(config: GmsConfig, request: LoadRequest) -> tuple[str, str]:
    """Return the digest of what is to be loaded, and how it was found."""
    if config.digest is not None:
        return config.digest, f"{config.digest}, given by the settings"
    found = checkpoint_digest(request.checkpoint, request.engine.component, request.is_pipeline)
    log.info("digest %s", found)
    return found.value, str(found)


def endpoint_of(config: GmsConfig) -> Endpoint:
    """Return the broker that the settings name, or the user's own."""
    default = Endpoint.default()
    return Endpoint(
        socket=os.path.abspath(config.socket_path) if config.socket_path else default.socket,
        start=config.start_broker,
        owners=default.owners | set(config.trusted_uids),
    )


def slot_name(tag: str, device: str, info: EngineInfo) -> str:
    """Return the name of one rank's slot."""
    world = info.topology.world
    parts = (tag, device, info.component or "-", info.role, f"{world.rank}of{world.size}")
    return "/".join(quote(part, safe="") for part in parts)


def _place(engine: Engine, writer: ArenaWriter, backing: Backing) -> None:
    """Give the engine's parameters shared memory before they are filled, if the engine can take it.

    Raises:
        ArenaError: there is no room; the engine is as it was.
    """
    try:
        engine.materialize(writer.alloc)
        backing.check_room(writer.nbytes)
    except EngineError as exc:
        log.info("%s, so the weights are moved once they are loaded", exc.brief)
    except WeightsError:
        if not engine.untouched():
            engine.reinit()
        raise
