# SPDX-License-Identifier: Apache-2.0
"""Which plugins are installed, from distribution metadata alone: nothing is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any

import attrs

from weights_core.errors import PluginConflictError

GROUP = "weights.plugins"
BUILT_IN = "disk"


@attrs.frozen(kw_only=True)
class Installed:
    """A plugin that can be imported: its name, the distribution that brings it, and how to get it."""

    name: str
    distribution: str
    version: str
    load: Callable[[], Any] = attrs.field(eq=False, repr=False)
    """Import and return the plugin's class."""

    @property
    def origin(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}"


def installed() -> tuple[Installed, ...]:
    """Return every plugin named by an entry point in the group `weights.plugins`, by name."""
    found = []
    for point in entry_points(group=GROUP):
        dist = point.dist
        found.append(
            Installed(
                name=point.name,
                distribution=dist.name if dist else "unknown",
                version=dist.version if dist else "?",
                load=point.load,
            )
        )
    return tuple(sorted(found, key=lambda plugin: plugin.name))


def check_names(plugins: Iterable[Installed]) -> None:
    """Refuse two plugins of one name: which of them is meant cannot be known.

    Raises:
        PluginConflictError: naming both distributions.
    """
    seen: dict[str, Installed] = {}
    for plugin in plugins:
        if plugin.name in seen:
            raise PluginConflictError(
                f"{seen[plugin.name].origin} and {plugin.origin} both bring a plugin {plugin.name!r}: "
                f"uninstall one, or block the name with WEIGHTS_BLOCK={plugin.name}"
            )
        seen[plugin.name] = plugin
