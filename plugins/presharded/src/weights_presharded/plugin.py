# SPDX-License-Identifier: Apache-2.0
"""The plugin: when it takes part, and with which settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import attrs

from weights_core import (
    Declined,
    FormatClaim,
    Layout,
    LoadRequest,
    ProviderPlugin,
    PublishReceipt,
    Role,
    hookimpl,
)
from weights_core.types import Fit
from weights_presharded.peer import gates

if TYPE_CHECKING:
    from weights_core import Engine, Outcome, Source, WeightSet
    from weights_presharded.peer.weights import PulledSet

NAME = "presharded"


def _address(_instance: object, _field: attrs.Attribute[str | None], value: str | None) -> None:
    if value is None:
        return
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"need host:port, the host as peers reach it, not {value!r}")


def _digest(_instance: object, _field: attrs.Attribute[str | None], value: str | None) -> None:
    from weights_core.digest import check_form

    if value is not None:
        check_form(value)


@attrs.frozen(kw_only=True)
class PreshardedConfig:
    """Settings.

    With `verify` every tensor's digest is computed as it is read, and compared with the manifest's.

    Of peers: `source` says whether this engine offers its weights, `target` whether it asks others;
    None leaves that to the environment, else to the format. `registry` is where they meet, a folder of
    this host (by default the user's own) or `redis://…`; `token_file` holds what both must know.
    `listen` is host:port for peers on other hosts. A target waits `wait` seconds for a source to appear,
    and gives up a source that has been silent for `stall`. A source says every `beat` seconds that it
    lives, and serves `limit` at a time. Where post-load writes to the weights, `snapshot` keeps what was
    there, and `drain` is how many seconds post-load waits for peers. With `in_place` parameters that
    have memory are filled where they are, else the engine is given other memory. `digest` is the
    checkpoint's, if it is known: no file is looked at for it then. `threads` copy and hash. The
    sources of `trusted_uids` are believed.
    """

    verify: bool = True
    source: bool | None = None
    target: bool | None = None
    registry: str | None = None
    token_file: str | None = None
    transport: Literal["auto", "local", "nixl"] = "auto"
    listen: str | None = attrs.field(default=None, validator=_address)
    wait: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    stall: float = attrs.field(default=10.0, validator=attrs.validators.gt(0))
    beat: float = attrs.field(default=5.0, validator=attrs.validators.gt(0))
    limit: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    snapshot: bool = False
    drain: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    in_place: bool = True
    digest: str | None = attrs.field(default=None, validator=_digest)
    threads: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(1))
    )
    trusted_uids: tuple[int, ...] = ()


class PreshardedPlugin(ProviderPlugin[PreshardedConfig]):
    """Brings each rank its own shard; the idea is TensorRT-LLM's PR 12898."""

    Config = PreshardedConfig

    def __init__(self, config: PreshardedConfig) -> None:
        super().__init__(config)
        self._pulled: PulledSet | None = None

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim what was cut for ranks beforehand, what peers have, and to be a peer."""
        from weights_presharded.folder import claim_of

        on_disk = claim_of(request)
        named = NAME in request.format
        asks = gates.is_target(self.config, os.environ, named=named)
        serves, what = self._serving(request)
        roles = {Role.SOURCE} if named or asks.open or on_disk else set()
        if isinstance(serves, gates.Serving):
            roles.add(Role.PUBLISHER)
        if not roles:
            return FormatClaim.refuse(f"not cut for ranks, so only when named; {what}")
        peers = f"asks peers ({asks.why})" if asks.open else f"asks no peers ({asks.why})"
        return FormatClaim(
            roles=roles,
            layouts=on_disk.layouts if on_disk and not asks.open else {Layout.SHARDED, Layout.FINAL},
            fit=on_disk.fit if on_disk else Fit.POSSIBLE,
            publish_at=serves.layout if isinstance(serves, gates.Serving) else None,
            parts=on_disk.parts if on_disk else (),
            reason=f"{on_disk.reason if on_disk else 'this rank alone'}; {peers}; {what}",
        )

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Ask peers, then the checkpoint's folder; decline if neither has this rank's shard."""
        reasons = []
        for ask in (self._from_a_peer, self._from_disk):
            try:
                return ask(request, engine)
            except Declined as exc:
                reasons.append(exc.brief)
        raise Declined("; ".join(reasons))

    @hookimpl
    def publish(self, request: LoadRequest, engine: Engine, layout: Layout) -> PublishReceipt | None:
        """Offer this rank's shard to peers."""
        from weights_presharded.peer.source import publish

        serves, _ = self._serving(request)
        if not isinstance(serves, gates.Serving):
            return None
        writer = self._pulled.keep_writer() if self._pulled is not None else None
        was_target = self._pulled is not None and not self._pulled.closed
        return publish(self.config, request, engine, serves, writer, was_target=was_target)

    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        """Let go of what only the load needed."""
        self._pulled = None

    def _serving(self, request: LoadRequest) -> tuple[gates.Serving | str, str]:
        """Return what this engine serves, or why nothing; and a sentence for the operator."""
        gate = gates.is_source(self.config, os.environ, named=NAME in request.format)
        if not gate.open:
            return gate.why, f"is no source ({gate.why})"
        serves = gates.serving(self.config, request.engine)
        if isinstance(serves, str):
            return serves, f"not a source: {serves}"
        return serves, f"a source of {serves.layout.value} weights, {serves.how} ({gate.why})"

    def _from_a_peer(self, request: LoadRequest, engine: Engine) -> WeightSet:
        gate = gates.is_target(self.config, os.environ, named=NAME in request.format)
        if not gate.open:
            raise Declined(f"peers are not asked: {gate.why}")
        from weights_presharded.peer.target import Target

        serves, _ = self._serving(request)
        target = Target(self.config, request, engine, serves_on=isinstance(serves, gates.Serving))
        self._pulled = target.pull()
        return self._pulled

    def _from_disk(self, request: LoadRequest, engine: Engine) -> WeightSet:
        from weights_presharded.folder import open_folder

        return open_folder(request, verify=self.config.verify)
