# SPDX-License-Identifier: Apache-2.0
"""Look for what would go wrong before it does: plugins, versions, extras, and the machine."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import attrs

from weights_core.config import Settings, blocked, merged
from weights_core.discovery import BUILT_IN, Installed, built_in, conflicts, installed
from weights_core.errors import PluginConfigError
from weights_core.host import PluginHost
from weights_core.machine import facts

Verdict = Literal["ok", "note", "problem"]

EXTRAS = {"plot": ("matplotlib", "`weights load --chart` draws no chart")}
"""Extra of weights-core → the module it brings, and what is lost without it."""


@attrs.frozen
class Finding:
    """One line of the doctor's: `problem` is what keeps a plugin or a load from working."""

    topic: str
    value: str
    meaning: str
    verdict: Verdict = "ok"

    def as_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return {name: str(value) for name, value in attrs.asdict(self).items()}

    def __str__(self) -> str:
        """Return the line for people."""
        meaning = f": {self.meaning}" if self.meaning else ""
        return f"{self.verdict:<8}{self.topic:<24}{self.value}{meaning}"


def examine(path: Path, config: Settings | None, environ: Mapping[str, str]) -> list[Finding]:
    """Return everything there is to say, the environment first, the machine last.

    Args:
        path: the folder that loads would read from.
        config: settings over those of `WEIGHTS_CONFIG`.
        environ: the environment, for `WEIGHTS_CONFIG` and `WEIGHTS_BLOCK`.
    """
    plugins = installed()
    return [
        *_versions(),
        *_plugins(plugins, config, environ),
        *_skew(plugins),
        *_extras(),
        *(Finding(fact.topic, fact.value, fact.meaning) for fact in facts(path)),
    ]


def _versions() -> list[Finding]:
    found = [Finding("Python", platform.python_version(), "")]
    for name in ("weights-core", "torch", "safetensors"):
        known = _version(name)
        if known:
            found.append(Finding(name, known, ""))
        else:
            found.append(Finding(name, "not installed", f"pip install {name}", "problem"))
    return found


def _plugins(
    plugins: tuple[Installed, ...], config: Settings | None, environ: Mapping[str, str]
) -> list[Finding]:
    block = blocked(environ)
    found = [
        Finding(
            "plugin " + name, " and ".join(p.origin for p in group), "both bring it: uninstall one", "problem"
        )
        for name, group in conflicts(p for p in (*plugins, built_in()) if p.name not in block).items()
    ]
    twice = {finding.topic.removeprefix("plugin ") for finding in found}
    try:
        settings = {n: given for n, given in merged(config, environ).items() if n not in twice - {BUILT_IN}}
        host = PluginHost([p for p in plugins if p.name not in twice], config=settings, block=block)
    except PluginConfigError as exc:
        return [*found, Finding("settings", str(exc), "no load can start", "problem")]
    for plugin, why in host.check():
        if why is None:
            found.append(Finding("plugin " + plugin.name, plugin.origin, ""))
        else:
            verdict: Verdict = "note" if plugin.name in block else "problem"
            found.append(Finding("plugin " + plugin.name, plugin.origin, why, verdict))
    return found


def _skew(plugins: tuple[Installed, ...]) -> list[Finding]:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    core, found = _version("weights-core") or "0", []
    for name in sorted({plugin.distribution for plugin in plugins}):
        for line in requires(name) or ():
            try:
                needs = Requirement(line)
            except InvalidRequirement as exc:
                found.append(Finding(name, f"requires {line!r}", f"which cannot be read: {exc}", "note"))
                continue
            applies = needs.marker is None or needs.marker.evaluate({"extra": ""})
            if canonicalize_name(needs.name) != "weights-core" or not applies:
                continue
            if not needs.specifier.contains(core, prereleases=True):
                meaning = f"this is weights-core {core}: install versions that go together"
                found.append(Finding(name, f"needs weights-core {needs.specifier}", meaning, "problem"))
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _extras() -> list[Finding]:
    return [
        Finding(f"extra [{extra}]", "missing", f"{lost}; pip install 'weights-core[{extra}]'", "note")
        if importlib.util.find_spec(module) is None
        else Finding(f"extra [{extra}]", f"{module} {_version(module) or 'of unknown version'}", "")
        for extra, (module, lost) in EXTRAS.items()
    ]
