# SPDX-License-Identifier: Apache-2.0
"""The plugin: when it takes part, and with which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from weights_core import Engine, Outcome, Source, WeightSet

NAME = "presharded"


@attrs.frozen(kw_only=True)
class PreshardedConfig:
    """Settings.

    With `verify` every tensor's digest is computed as it is read, and compared with the manifest's.
    """

    verify: bool = True


class PreshardedPlugin(ProviderPlugin[PreshardedConfig]):
    """Brings each rank its own shard; the idea is TensorRT-LLM's PR 12898."""

    Config = PreshardedConfig

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim what was cut for ranks beforehand."""
        if NAME not in request.format:
            return FormatClaim.refuse("only when named")
        return FormatClaim(
            roles={Role.SOURCE},
            layouts={Layout.SHARDED},
            reason="this rank's shard, and nothing else",
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
        return None

    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        """Let go of what only the load needed."""

    def _from_a_peer(self, request: LoadRequest, engine: Engine) -> WeightSet:
        raise Declined("no peer was asked")

    def _from_disk(self, request: LoadRequest, engine: Engine) -> WeightSet:
        raise Declined(f"{request.checkpoint} was not cut for ranks")
