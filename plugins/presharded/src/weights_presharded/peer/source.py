# SPDX-License-Identifier: Apache-2.0
"""Offer an engine's weights to peers, for as long as the lease lasts."""

from __future__ import annotations

import functools
import logging
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

from weights_core import Identity, PublishReceipt
from weights_core.digest import checkpoint_digest
from weights_core.errors import PublishError, WeightsError
from weights_presharded.peer.entry import Entry, this_host
from weights_presharded.peer.local import LocalGrantor
from weights_presharded.peer.offer import Offer, make_offer, room_for
from weights_presharded.peer.places import local_folder, open_registry, owners, threads_of, token_of
from weights_presharded.peer.server import Server
from weights_presharded.peer.settling import Settling

if TYPE_CHECKING:
    from weights_core import Engine, LoadRequest
    from weights_core.arena import ArenaWriter
    from weights_presharded.peer.gates import Serving
    from weights_presharded.peer.transport import Grantor
    from weights_presharded.plugin import PreshardedConfig

log = logging.getLogger("weights.presharded")


def publish(
    config: PreshardedConfig,
    request: LoadRequest,
    engine: Engine,
    serving: Serving,
    writer: ArenaWriter | None,
    *,
    was_target: bool,
) -> PublishReceipt:
    """Make an offer of the engine's weights and serve it; the receipt says what that takes.

    Args:
        config: the settings.
        request: what was loaded.
        engine: that holds it.
        serving: which weights, and how.
        writer: the memory that the weights were pulled into, if they were.
        was_target: whether they were.

    Raises:
        PublishError: nobody can be served.
        WeightsError: what keeps it from being offered.
    """
    digest, found = _digest(config, request)
    identity = Identity.of(request.engine, digest, serving.layout)
    offer = make_offer(
        engine,
        serving,
        writer,
        expected_bytes=room_for(engine, serving.layout),
        threads=threads_of(config),
        transport=config.transport,
    )
    try:
        server = _serve(config, identity, offer)
    except BaseException:
        offer.close()
        raise
    where = f"source {server.entry.id[:8]} at {server.entry.address or server.entry.socket}"
    detail = [
        f"{where}, {_HOW[serving.how]}",
        f"{offer.moved / 1e6:,.1f} MB moved to be served, {offer.held / 1e6:,.1f} MB held besides",
        f"digest {found}",
    ]
    if was_target:
        detail.append("a target that is a source now")
    if serving.how == "drain":
        detail.append(_drained(server, config))
    log.info("%s serves %.1f MB", where, offer.nbytes / 1e6)
    close = functools.partial(Server.close, server)
    return PublishReceipt(layout=offer.layout, nbytes=offer.nbytes, detail="; ".join(detail), close=close)


_HOW = {
    "live": "the engine's own memory",
    "snapshot": "a snapshot: what the engine writes later is its own",
    "drain": "until its post-load",
}


def _serve(config: PreshardedConfig, identity: Identity, offer: Offer) -> Server:
    folder = local_folder(config, os.environ)
    token = token_of(config, folder)
    registry = open_registry(config, os.environ)
    name = uuid.uuid4().hex
    entry = Entry(
        id=name,
        identity=identity,
        nbytes=offer.nbytes,
        tensors=len(offer.manifest.places),
        memory=offer.memory,
        device=offer.device,
        host=this_host(),
        pid=os.getpid(),
        uid=os.geteuid(),
        socket=os.path.join(folder, f"{name[:16]}.sock"),
        started=time.time(),
        beat=config.beat,
        limit=config.limit,
    )
    grantors: dict[str, Grantor] = {}
    if config.transport != "nixl" or offer.memory == "host":
        grantors["local"] = LocalGrantor()
    listen = listening(config)
    if listen is not None or config.transport == "nixl":
        from weights_presharded.peer.nixl import NixlGrantor

        grantors["nixl"] = NixlGrantor(offer)

    settling = Settling(offer.segments, offer.manifest.sizes) if offer.memory == "host" else Settling((), ())

    def grant(transport: str) -> tuple[dict[str, Any], list[int]] | None:
        return grantors[transport].grant(offer) if transport in grantors else None

    def on_close() -> None:
        settling.close()
        for grantor in grantors.values():
            grantor.close()
        offer.close()

    try:
        return Server(
            entry, folder, registry, token, grant, owners=owners(config), listen=listen, on_close=on_close
        )
    except BaseException:
        settling.close()
        registry.close()
        for grantor in grantors.values():
            grantor.close()
        raise


def listening(config: PreshardedConfig) -> tuple[str, int] | None:
    """Return host and port to listen at for peers on other hosts, if the settings say so."""
    if config.listen is None:
        return None
    host, _, port = config.listen.rpartition(":")
    return host, int(port)


def _drained(server: Server, config: PreshardedConfig) -> str:
    """Hold the engine before its post-load until a peer has taken the weights, then serve no more."""
    started = time.monotonic()
    until = started + config.drain
    with server.taken:
        server.taken.wait_for(lambda: server.entry.served > 0 and not server.entry.active, config.drain)
    late = time.monotonic() >= until
    server.close()
    told = "the time was over" if late else "then its post-load went on"
    return (
        f"waited {time.monotonic() - started:.1f} s for peers before post-load; "
        f"{server.entry.served} took the weights, {told}"
    )


def _digest(config: PreshardedConfig, request: LoadRequest) -> tuple[str, str]:
    if config.digest is not None:
        return config.digest, f"{config.digest}, given by the settings"
    try:
        found = checkpoint_digest(request.checkpoint, request.engine.component, request.is_pipeline)
    except WeightsError as exc:
        raise PublishError(f"whose weights these are cannot be told: {exc.brief}") from exc
    return found.value, str(found)
