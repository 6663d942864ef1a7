# SPDX-License-Identifier: Apache-2.0
"""The host: which plugins may take part in loads, and their settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping

import attrs

from weights_core import config as settings
from weights_core import trace
from weights_core.discovery import BUILT_IN, Installed, built_in, check_names, installed
from weights_core.engine import Engine
from weights_core.errors import PluginConfigError, PluginError, PluginNotFoundError
from weights_core.hooks import Hooks, LeftOut
from weights_core.progress import Show
from weights_core.session import Session
from weights_core.types import LoadRequest

log = logging.getLogger("weights")


@attrs.frozen(kw_only=True)
class PluginInfo:
    """What is known of an installed plugin without a load: `why_not` is None if it can be used.

    `roles` follow from its hooks: a provider is a source or an owner, which it says for each load.
    """

    name: str
    distribution: str
    version: str
    roles: tuple[str, ...]
    why_not: str | None
    settings: Mapping[str, object]

    @property
    def origin(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}"

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "roles": list(self.roles),
            "active": self.why_not is None,
            "why_not": self.why_not,
        }


Enable = str | Collection[str]


class PluginHost:
    """A fixed choice of plugins and settings, from which sessions are opened.

    Every session gets plugin instances of its own, so loads may run side by side and two hosts in
    one process don't meet. A plugin is imported by the first session that needs it.
    """

    def __init__(
        self,
        plugins: Iterable[Installed],
        *,
        config: settings.Settings | None = None,
        enable: Enable = "installed",
        block: Collection[str] = (),
        observer: trace.Observer | None = None,
    ) -> None:
        """Choose among `plugins`; the built-in disk source is always added.

        Args:
            plugins: what is there to choose from.
            config: plugin name → setting → value.
            enable: `"installed"` for all, or the name or names to use, in the order that breaks ties.
            block: names that are never used, whatever else is said.
            observer: is told of every hook call of every session.

        Raises:
            PluginConflictError: two plugins of one name, neither blocked.
            PluginNotFoundError: `enable` names one that is not installed.
            PluginConfigError: `config` names one that is not installed.
        """
        known = (*plugins, built_in())
        self._observer = observer
        self._blocked = frozenset(block)
        check_names(p for p in known if p.name not in self._blocked)
        self._plugins = {p.name: p for p in known}
        names = (enable,) if isinstance(enable, str) else tuple(enable)
        for name in sorted(self._blocked - self._plugins.keys()):
            near = settings.did_you_mean(name, self._plugins)
            log.warning("blocked plugin %r is not installed%s", name, near)
        self._explicit = None if names == ("installed",) else names
        self._config: Mapping[str, Mapping[str, object]] = dict(config or {})
        for name in self._explicit or ():
            if name not in self._plugins:
                near = settings.did_you_mean(name, self._plugins)
                raise PluginNotFoundError(f"plugin {name!r} is enabled but not installed{near}")
        for name in self._config:
            if name not in self._plugins:
                near = settings.did_you_mean(name, self._plugins)
                raise PluginConfigError(f"settings for plugin {name!r}, which is not installed{near}")

    @classmethod
    def discover(
        cls,
        config: settings.Settings | None = None,
        *,
        enable: Enable = "installed",
        environ: Mapping[str, str] = os.environ,
    ) -> PluginHost:
        """Return a host over the installed plugins.

        `WEIGHTS_CONFIG`, `WEIGHTS_BLOCK` and `WEIGHTS_TRACE` are applied.
        """
        return cls(
            installed(),
            config=settings.merged(config, environ),
            enable=enable,
            block=settings.blocked(environ),
            observer=trace.from_environment(environ),
        )

    def session(self, request: LoadRequest, engine: Engine, *, progress: Show = "rank 0") -> Session:
        """Return a new session for one load; nothing happens until its first step."""
        return Session(self.hooks, request, engine, progress=progress)

    def hooks(self, request: LoadRequest) -> Hooks:
        """Import and register the chosen plugins, new instances of each.

        Raises:
            PluginError: a plugin that the request names, or that is explicitly enabled, is broken.
                Others that are broken are left out, with a warning.
        """
        hooks = Hooks(rank=request.rank, observer=self._observer)
        demanded = {*request.format, *(self._explicit or ())}
        for plugin, exc in self._register(hooks):
            if plugin.name in demanded or isinstance(exc, PluginConfigError):
                raise exc
            log.warning("%s", exc)
        return hooks

    def check(self) -> list[tuple[Installed, str | None]]:
        """Return every installed plugin by name, with the reason why it can't be used, if so."""
        return [(self._plugins[one.name], one.why_not) for one in self.overview()]

    def overview(self) -> list[PluginInfo]:
        """Return what every installed plugin is, by name."""
        hooks = Hooks()
        self._register(hooks)
        left_out = {out.plugin.name: out.reason for out in hooks.left_out}
        return [
            PluginInfo(
                name=name,
                distribution=plugin.distribution,
                version=plugin.version,
                roles=hooks.roles(name) if name in hooks.plugins else (),
                why_not=left_out.get(name),
                settings=hooks.settings(name) if name in hooks.plugins else {},
            )
            for name, plugin in sorted(self._plugins.items())
        ]

    def _register(self, hooks: Hooks) -> list[tuple[Installed, PluginError]]:
        """Register the chosen plugins; return those that are broken."""
        broken = []
        # A wrapper registered later is further out; names read from the outside in.
        for plugin in sorted(self._plugins.values(), key=self._order, reverse=True):
            reason = self._why_not(plugin.name)
            if reason is None:
                try:
                    hooks.register(plugin, self._config.get(plugin.name, {}))
                except PluginError as exc:
                    broken.append((plugin, exc))
                    reason = f"broken: {exc.brief}"
            if reason is not None:
                hooks.left_out.append(LeftOut(plugin, reason))
        return broken

    def _why_not(self, name: str) -> str | None:
        if name in self._blocked:
            return "blocked"
        if self._explicit is not None and name not in self._explicit and name != BUILT_IN:
            return "not in the list of enabled plugins"
        return None

    def _order(self, plugin: Installed) -> tuple[int, str]:
        explicit = self._explicit or ()
        return (explicit.index(plugin.name) if plugin.name in explicit else len(explicit)), plugin.name
