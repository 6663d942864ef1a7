# SPDX-License-Identifier: Apache-2.0
"""Record the hook calls of a host's sessions, to assert on them."""

from __future__ import annotations

from weights_core.trace import HookCall


class HookRecorder:
    """An observer for a host that keeps every call; `print(recorder)` shows them as a trace does."""

    def __init__(self) -> None:
        self.calls: list[HookCall] = []

    def __call__(self, call: HookCall) -> None:
        """Keep a call."""
        self.calls.append(call)

    def of(self, plugin: str | None = None, hook: str | None = None) -> list[HookCall]:
        """Return the calls of a plugin, of a hook, of both, or all, in the order they ended."""
        return [c for c in self.calls if plugin in (None, c.plugin) and hook in (None, c.hook)]

    def names(self, plugin: str | None = None) -> list[str]:
        """Return `plugin.hook` for every call, or `hook` for those of one plugin."""
        return [c.hook if plugin else f"{c.plugin}.{c.hook}" for c in self.of(plugin)]

    def clear(self) -> None:
        """Forget what was recorded."""
        self.calls.clear()

    def __str__(self) -> str:
        return "\n".join(str(call) for call in self.calls)
