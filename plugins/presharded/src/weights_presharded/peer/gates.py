# SPDX-License-Identifier: Apache-2.0
"""Whether an engine asks peers, whether it is one, and which of its weights it serves. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import attrs

from weights_core import Layout

if TYPE_CHECKING:
    from weights_core import EngineInfo
    from weights_presharded.plugin import PreshardedConfig

URL, TARGET, SOURCE = "MODEL_EXPRESS_URL", "MODEL_EXPRESS_TARGET", "MODEL_EXPRESS_SOURCE"


@attrs.frozen
class Gate:
    """An answer, and what decided it."""

    open: bool
    why: str


@attrs.frozen
class Serving:
    """Which weights are served, and how they stay what they are while the engine goes on.

    `live`: nothing writes to them. `snapshot`: what is written later goes elsewhere, or they were
    copied. `drain`: the engine waits before its post-load until peers have come or a time is over.
    """

    layout: Layout
    how: Literal["live", "snapshot", "drain"]


def is_source(config: PreshardedConfig, environ: Mapping[str, str], *, named: bool) -> Gate:
    """Decide whether this engine offers its weights: the settings, else the environment, else the format.

    A variable that is set to nothing is not set. `MODEL_EXPRESS_SOURCE` counts only as exactly `1`.
    """
    if config.source is not None:
        return Gate(config.source, f"source={str(config.source).lower()} in the settings")
    if environ.get(SOURCE) == "1":
        return Gate(True, f"{SOURCE} is 1")
    if environ.get(URL):
        if environ.get(TARGET):
            return Gate(False, f"{TARGET} is set")
        return Gate(True, f"{URL} is set and {TARGET} is not")
    return Gate(named, "the format names it" if named else "the format does not name it")


def is_target(config: PreshardedConfig, environ: Mapping[str, str], *, named: bool) -> Gate:
    """Decide whether this engine asks peers, by the same order."""
    if config.target is not None:
        return Gate(config.target, f"target={str(config.target).lower()} in the settings")
    if environ.get(TARGET):
        return Gate(True, f"{TARGET} is set")
    return Gate(named, "the format names it" if named else "the format does not name it")


def serving(config: PreshardedConfig, info: EngineInfo) -> Serving | str:
    """Return what an engine can serve, or why it is no source."""
    can = [one for one in (Layout.FINAL, Layout.SHARDED) if one in info.shareable and one in info.accepts]
    if not can:
        shares = ", ".join(sorted(one.value for one in info.shareable)) or "nothing"
        accepts = ", ".join(sorted(one.value for one in info.accepts))
        return f"engine {info.name} shares {shares} and accepts {accepts}: no layout is both"
    if Layout.FINAL in can and not info.mutates_after_load:
        return Serving(Layout.FINAL, "live")
    if Layout.SHARDED not in can:
        return f"engine {info.name} changes its weights after the load: {info.mutates_after_load}"
    changed = info.post_load_writes or info.mutates_after_load
    if changed is None:
        return Serving(Layout.SHARDED, "live")
    if config.snapshot:
        return Serving(Layout.SHARDED, "snapshot")
    if config.drain:
        return Serving(Layout.SHARDED, "drain")
    return (
        f"engine {info.name} writes to its weights later ({changed}); snapshot=true keeps what was there, "
        "drain=SECONDS waits for peers before"
    )
