# SPDX-License-Identifier: Apache-2.0
"""The plugin: when it takes part, and with which settings."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Literal

import attrs

from weights_core import (
    FormatClaim,
    Layout,
    LoadRequest,
    ProviderPlugin,
    PublishReceipt,
    Role,
    hookimpl,
)

if TYPE_CHECKING:
    from weights_core import Engine, EngineInfo, Outcome, Source, WeightSet
    from weights_gms.owner import Owner

NAME = "gms"


def _tag(_instance: object, _field: attrs.Attribute[str], value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise ValueError(f"a tag is 1 to 64 letters, digits and . _ -, not {value!r}")


def _digest(_instance: object, _field: attrs.Attribute[str | None], value: str | None) -> None:
    from weights_core.digest import check_form

    if value is not None:
        check_form(value)


@attrs.frozen(kw_only=True)
class GmsConfig:
    """Settings.

    `socket_path` is the broker's socket, the user's own by default; `start_broker` says whether to
    start one there. `mode`: `auto` reads what the slot has, or else loads and offers it; `rw` loads
    and replaces; `ro` reads, or waits for somebody who writes. Slots are named by `tag` among other
    things. `timeout` is how long to wait for others, in seconds. With `replace="evict-first"` a
    writer waits until the old weights are given back, for where two generations don't fit. Weights
    that nobody uses are kept for `keep` seconds more. `digest` is the checkpoint's, if it is known:
    no file is looked at for it then. The brokers of `trusted_uids` are believed. `backend="dynamo"`
    uses the server of NVIDIA Dynamo's GPU Memory Service instead.
    """

    socket_path: str | None = None
    start_broker: bool = True
    mode: Literal["auto", "rw", "ro"] = "auto"
    tag: str = attrs.field(default="weights", validator=_tag)
    timeout: float = attrs.field(default=600.0, validator=attrs.validators.ge(0))
    replace: Literal["keep", "evict-first"] = "keep"
    keep: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    digest: str | None = attrs.field(default=None, validator=_digest)
    trusted_uids: tuple[int, ...] = ()
    backend: Literal["vault", "dynamo"] = "vault"


class GmsPlugin(ProviderPlugin[GmsConfig]):
    """Holds one copy of the weights for all engines of a node; the idea is TensorRT-LLM's PR 13926."""

    Config = GmsConfig

    def __init__(self, config: GmsConfig) -> None:
        super().__init__(config)
        self._owner: Owner | None = None

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        """Claim to own the weights, and to offer them, if the engine's can be shared."""
        info = request.engine
        layout = shared_layout(info)
        if layout is None:
            shares = ", ".join(sorted(one.value for one in info.shareable)) or "nothing"
            accepts = ", ".join(sorted(one.value for one in info.accepts))
            refusal = f"engine {info.name} shares {shares} and accepts {accepts}: no layout is both"
            if info.quantization is not None:
                refusal += f"; a model quantised by {info.quantization} is each engine's own"
            return FormatClaim.refuse(refusal)
        reason = f"one copy of the {layout.value} weights per node, mode {self.config.mode}"
        layouts = {layout, Layout.CHECKPOINT}
        if NAME not in request.format or info.mutates_after_load:  # the core says why not
            return FormatClaim(roles={Role.OWNER}, layouts=layouts, reason=reason)
        return FormatClaim(
            roles={Role.OWNER, Role.PUBLISHER},
            layouts=layouts,
            publish_at=layout,
            required=self.config.mode == "rw",
            reason=reason,
            held=functools.partial(_held, self.config, info),
        )

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """Read what the slot has, or get the weights from below and write them where all can read."""
        layout = shared_layout(request.engine)
        assert layout is not None
        owner: Owner
        if self.config.backend == "dynamo":
            from weights_gms.dynamo import DynamoOwner

            owner = DynamoOwner(self.config, request, engine, layout)
        else:
            from weights_gms.owner import VaultOwner

            owner = VaultOwner(self.config, request, engine, layout)
        self._owner = owner
        return owner.load(source)

    @hookimpl
    def publish(self, request: LoadRequest, engine: Engine, layout: Layout) -> PublishReceipt | None:
        """Offer what this engine wrote; a reader, and an engine that was served by others, offer nothing."""
        return self._owner.publish(engine) if self._owner is not None else None

    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        """Give up what was not offered; the lease on the rest belongs to the set."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.finish()


def shared_layout(info: EngineInfo) -> Layout | None:
    """Return the furthest layout that an engine both shares and accepts, or None."""
    return next(
        (one for one in (Layout.FINAL, Layout.SHARDED) if one in info.shareable and one in info.accepts), None
    )


def _held(config: GmsConfig, info: EngineInfo) -> int:
    from weights_gms.held import held_bytes

    return held_bytes(config, info)
