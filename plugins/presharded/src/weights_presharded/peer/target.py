# SPDX-License-Identifier: Apache-2.0
"""Pull this rank's weights from a source that runs, on every rank or on none."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from weights_core import Declined, Identity, Layout, LoadFailed
from weights_core.arena import ArenaWriter, Manifest
from weights_core.backing import backing_for
from weights_core.digest import checkpoint_digest
from weights_core.errors import RanksDisagreeError, WeightsError
from weights_core.ranks import gather
from weights_presharded.peer import catalog
from weights_presharded.peer.client import BusyError, Connection, GoneError, PeerError, ask
from weights_presharded.peer.entry import Entry
from weights_presharded.peer.landing import Landing, has_memory, in_own_memory, in_parameters
from weights_presharded.peer.offer import new_writer, read_described
from weights_presharded.peer.ordinary import memory_to_serve
from weights_presharded.peer.places import (
    local_folder,
    open_registry,
    owners,
    threads_of,
    token_of,
)
from weights_presharded.peer.registry import Registry
from weights_presharded.peer.transport import Fetch, Transport
from weights_presharded.peer.weights import PulledSet

if TYPE_CHECKING:
    from weights_core import Engine, LoadRequest
    from weights_presharded.plugin import PreshardedConfig

log = logging.getLogger("weights.presharded")

_POLL = 0.2


@attrs.frozen(eq=False)
class Pulled:
    """What came, from whom, and what it took."""

    landing: Landing
    manifest: Manifest
    entry: Entry
    transport: str
    seconds: float
    notes: tuple[str, ...]


class Target:
    """One rank that asks."""

    def __init__(
        self, config: PreshardedConfig, request: LoadRequest, engine: Engine, *, serves_on: bool
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            config: the settings.
            request: what is to be loaded.
            engine: that asks.
            serves_on: whether it will be a source itself, so that memory is taken that can be.
        """
        self._config = config
        self._request = request
        self._engine = engine
        self._serves_on = serves_on
        self._found = ""
        self._failed: list[str] = []
        self._wrote = False

    def pull(self) -> PulledSet:
        """Find a source, and bring its weights here.

        Raises:
            Declined: there is none, for some rank, or none could serve; nothing was written.
            LoadFailed: none could finish, and parameters were written.
        """
        candidates: list[Entry] = []
        why = ""
        registry: Registry | None = None
        try:
            registry = open_registry(self._config, os.environ)
            candidates = self._candidates(registry)
        except WeightsError as exc:
            why = exc.brief
        finally:
            if registry is not None:
                registry.close()
        self._agree(why or ("" if candidates else "; ".join(self._failed) or "no peer serves these weights"))
        pulled: Pulled | None = None
        try:
            pulled = self._pull_any(candidates)
            self._agree("" if pulled is not None else "; ".join(self._failed))
        except BaseException:
            if pulled is not None and pulled.landing.writer is not None:
                pulled.landing.writer.close()
            raise
        assert pulled is not None
        return self._as_set(pulled)

    # ------------------------------------------------------------------------------------------

    def _agree(self, why_not: str) -> None:
        """Go on only if every rank can.

        Raises:
            Declined, LoadFailed: one can't; says which and why.
            RanksDisagreeError: one stays away.
        """
        world = self._request.engine.topology.world
        mine = ("presharded", why_not, self._wrote)
        everyone: Sequence[object] = [mine]
        if world.size > 1:
            try:
                everyone = gather(self._engine, self._request, mine, "asking peers")
            except RanksDisagreeError as exc:
                exc.mutated = self._wrote
                raise
        for rank, theirs in enumerate(everyone):
            if not (isinstance(theirs, tuple | list) and len(theirs) == 3 and theirs[0] == "presharded"):
                raise LoadFailed(f"rank {rank} is at another step: {theirs!r}", mutated=self._wrote)
        reasons = {rank: theirs[1] for rank, theirs in enumerate(everyone) if theirs[1]}  # type: ignore[index]
        if not reasons:
            return
        rank = world.rank if world.rank in reasons else min(reasons)
        why = str(reasons[rank])
        told = why if world.size == 1 else f"rank {rank}: {why}"
        if any(theirs[2] for theirs in everyone):  # type: ignore[index]
            raise LoadFailed(f"no peer could finish: {told}", mutated=self._wrote)
        raise Declined(told)

    def _candidates(self, registry: Registry) -> list[Entry]:
        """Return the sources of these weights, those with most room first; wait for one if so set."""
        until = time.monotonic() + self._config.wait
        while True:
            found = self._matching(registry)
            if found or time.monotonic() >= until:
                return found
            time.sleep(min(_POLL, max(0.0, until - time.monotonic())))

    def _matching(self, registry: Registry) -> list[Entry]:
        self._failed = []
        entries = registry.entries()
        alive = [e for e in entries if not e.is_stale]
        if not alive:
            stale = f" ({len(entries)} stale entries)" if entries else ""
            self._failed.append(f"no source is in {registry.name}{stale}")
            return []
        ours = [e for e in alive if not self._differences(e, digest=None)]
        if not ours:
            self._failed.append(self._nearest(alive, digest=None))
            return []
        digest = self._digest()
        equal = [e for e in ours if not self._differences(e, digest=digest)]
        if not equal:
            self._failed.append(self._nearest(ours, digest=digest))
            return []
        random.shuffle(equal)
        return sorted(equal, key=lambda e: e.active / max(1, e.limit))

    def _wanted(self, layout: Layout, digest: str) -> Identity:
        return Identity.of(self._request.engine, digest, layout)

    def _differences(self, entry: Entry, digest: str | None) -> Mapping[str, tuple[object, object]]:
        """Return the fields in which a source's weights differ from what is needed here."""
        layout = entry.identity.layout
        accepts = self._request.engine.accepts - {Layout.CHECKPOINT}
        if layout not in accepts:
            need = " or ".join(sorted(one.value for one in accepts)) or "none of a peer's"
            return {"layout": (need, layout.value)}
        return self._wanted(layout, digest or entry.identity.digest).differences(entry.identity)

    def _nearest(self, entries: Sequence[Entry], digest: str | None) -> str:
        """Say in what the source that is nearest differs."""
        nearest = min(entries, key=lambda e: len(self._differences(e, digest)))
        fields = self._differences(nearest, digest)
        listed = "; ".join(
            f"{name}: need {mine!r}, has {theirs!r}" for name, (mine, theirs) in fields.items()
        )
        return f"none of {len(entries)} sources has these weights; the nearest, {nearest.name}: {listed}"

    def _digest(self) -> str:
        if self._config.digest is not None:
            self._found = f"{self._config.digest}, given by the settings"
            return self._config.digest
        if not self._found:
            request = self._request
            found = checkpoint_digest(request.checkpoint, request.engine.component, request.is_pipeline)
            self._found, self._value = str(found), found.value
        return self._value

    def _pull_any(self, candidates: Sequence[Entry]) -> Pulled | None:
        """Try each source, then wait for a place at those that had none."""
        busy: list[Entry] = []
        for wait in (0.0, max(self._config.wait, self._config.stall)):
            for entry in candidates if wait == 0.0 else busy[:]:
                try:
                    return self._pull_one(entry, wait)
                except BusyError as exc:
                    busy.append(entry)
                    if wait:
                        self._failed.append(f"{entry.name}: {exc.brief}")
                except (WeightsError, OSError, ValueError) as exc:
                    why = exc.brief if isinstance(exc, WeightsError) else f"{type(exc).__name__}: {exc}"
                    log.warning("source %s: %s", entry.name, why)
                    self._failed.append(f"{entry.name}: {why}")
                    if isinstance(exc, GoneError):
                        self._forget(entry)
        return None

    def _forget(self, entry: Entry) -> None:
        """Take a source out of the registry that is on this host and is not there any more."""
        if not entry.is_here or entry.uid != os.geteuid():
            return
        try:
            registry = open_registry(self._config, os.environ)
            try:
                registry.remove(entry)
            finally:
                registry.close()
        except WeightsError as exc:
            log.debug("the stale entry of %s stays: %s", entry.name, exc)

    def _pull_one(self, entry: Entry, wait: float) -> Pulled:
        transport = self._transport(entry)
        connection = ask(
            entry,
            self._wanted(entry.identity.layout, entry.identity.digest),
            transport.name,
            token=token_of(self._config, local_folder(self._config, os.environ)),
            owners=owners(self._config),
            stall=self._config.stall,
            wait=wait,
        )
        with connection:
            manifest, sums = read_described(transport.described(connection))
            if manifest.layout is not entry.identity.layout:
                raise PeerError(f"offers the layout {manifest.layout.value}")
            landing = self._landing(manifest, connection, transport)
            started = time.monotonic()
            try:
                self._fetch(Fetch(
                    connection=connection,
                    manifest=manifest,
                    sums=sums,
                    landing=landing,
                    device=self._request.engine.device,
                    verify=self._config.verify,
                    threads=threads_of(self._config),
                    stall=self._config.stall,
                ), transport)  # fmt: skip
            except BaseException:
                if landing.writer is not None:
                    landing.writer.close()
                raise
            seconds = time.monotonic() - started
            connection.done()
        return Pulled(landing, manifest, entry, transport.name, seconds, transport.notes)

    def _fetch(self, fetch: Fetch, transport: Transport) -> None:
        try:
            transport.fetch(fetch)
            fetch.landing.finish()
        finally:  # also where all is well: another rank may have failed
            self._wrote = self._wrote or (fetch.landing.in_place and transport.wrote)

    def _landing(self, manifest: Manifest, connection: Connection, transport: Transport) -> Landing:
        tensors = catalog.tensors_of(self._engine, manifest)
        catalog.check(manifest, self._engine, tensors)
        device = self._request.engine.device
        by_sums = transport.name == "nixl" and not device.startswith("cpu")  # of whole segments
        if tensors is not None and has_memory(tensors) and self._config.in_place and not by_sums:
            return in_parameters(manifest, self._engine)
        whole = connection.told.get("memory") != "host" or transport.name != "local"
        nbytes = manifest.nbytes
        backing = memory_to_serve(backing_for(self._request.engine), self._config.transport, device)
        backing.check_room(nbytes)
        writer: ArenaWriter | None = new_writer(backing, nbytes) if self._serves_on else None
        return in_own_memory(manifest, writer, device, whole_segments=whole)

    def _transport(self, entry: Entry) -> Transport:
        local = entry.is_here and os.path.exists(entry.socket)
        if local and self._config.transport in ("auto", "local"):
            from weights_presharded.peer.local import LocalTransport

            return LocalTransport()
        if self._config.transport == "local":
            raise PeerError("is on another host, and transport='local'")
        if entry.address is None and not local:
            raise PeerError("is on another host, and does not listen for others")
        from weights_presharded.peer.nixl import NixlTransport

        return NixlTransport()

    def _as_set(self, pulled: Pulled) -> PulledSet:
        landing, seconds = pulled.landing, pulled.seconds
        rate = landing.nbytes / seconds / 1e9 if seconds else 0.0
        checked = "every tensor verified" if self._config.verify else "not verified, as the settings say"
        notes = [
            f"presharded: {pulled.manifest.layout.value} weights of {pulled.entry.name} by "
            f"{pulled.transport}: {landing.nbytes / 1e6:,.1f} MB in {seconds:.3f} s, {rate:.2f} GB/s, "
            f"{checked}",
            f"presharded: the weights' digest is {self._found}",
            *(f"presharded: passed over {why}" for why in self._failed),
            *pulled.notes,
        ]
        return PulledSet(pulled.manifest, landing, tuple(notes), seconds)
