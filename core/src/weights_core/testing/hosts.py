# SPDX-License-Identifier: Apache-2.0
"""Hosts over plugins given as classes, sealed from what the machine has installed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from weights_core.config import Settings
from weights_core.discovery import Installed
from weights_core.host import Enable, PluginHost
from weights_core.trace import Observer


def installed_as(
    name: str, plugin: Any, *, distribution: str | None = None, version: str = "1.0"
) -> Installed:
    """Return a plugin class as if a distribution had brought it under `name`."""
    brings = distribution or f"weights-{name.replace('_', '-')}"
    return Installed(name=name, distribution=brings, version=version, load=lambda: plugin)


def host_of(
    *,
    config: Settings | None = None,
    enable: Enable = "installed",
    block: Collection[str] = (),
    observer: Observer | None = None,
    **plugins: Any,
) -> PluginHost:
    """Return a host over `name=class` alone and the built-in disk; the environment is not read."""
    known = [installed_as(name, plugin) for name, plugin in plugins.items()]
    return PluginHost(known, config=config, enable=enable, block=block, observer=observer)
