# SPDX-License-Identifier: Apache-2.0
"""What `weights check` runs: an author's contract, or the default one of each role."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from weights_core.config import did_you_mean
from weights_core.discovery import BUILT_IN, CONTRACTS, built_in, check_names, installed
from weights_core.errors import ExtraNotInstalledError, PluginError, PluginNotFoundError

if TYPE_CHECKING:
    from weights_core.testing.contract import Subject
    from weights_core.testing.contract.check import Verdict


def tried(
    name: str, contract: str | None, settings: Mapping[str, object]
) -> Iterator[tuple[str, Iterator[Verdict]]]:
    """Yield a heading and the verdicts for each contract that the plugin is tried on.

    Raises:
        PluginNotFoundError: no such plugin is installed.
        PluginError: it or the contract is broken, or it takes no part.
        ExtraNotInstalledError: a contract of an author's needs pytest, which is not there.
    """
    from weights_core.testing.contract.check import subjects, verdicts

    known = (*installed(), built_in())
    check_names(plugin for plugin in known if plugin.name == name)
    plugins = {plugin.name: plugin for plugin in known}
    if name not in plugins:
        raise PluginNotFoundError(f"plugin {name!r} is not installed{did_you_mean(name, plugins)}")
    if contract is not None:
        subject, exclusions = _of_author(contract)
        if subject.name != name:
            raise PluginError(f"{contract} is the contract of plugin {subject.name!r}, not of {name!r}")
        yield f"{plugins[name].origin}: {name}, by {contract}", verdicts(subject, exclusions)
        return
    brought = _of_distribution(name, settings)
    for subject, exclusions in brought:
        what = f", {subject.what}" if subject.what else ""
        yield f"{plugins[name].origin}: {name} as a {subject.role.value}{what}", verdicts(subject, exclusions)
    if brought:
        return
    plugin = plugins[name]
    if name == BUILT_IN:  # tried under another name: hosts bring it along under its own
        plugin = attrs.evolve(plugin, name="built_in")
    for subject in subjects(plugin, settings):
        yield f"{plugin.origin}: {name} as a {subject.role.value}", verdicts(subject, {})


def _of_distribution(
    name: str, settings: Mapping[str, object]
) -> Sequence[tuple[Subject, Mapping[str, str]]]:
    """Return what a plugin's distribution brings to try it on: it may not read safetensors checkpoints."""
    found = [one for one in installed(CONTRACTS) if one.name == name]
    check_names(found)
    if not found:
        return ()
    try:
        return list(found[0].load()(settings))
    except Exception as exc:  # a third party's function may raise anything
        raise PluginError(f"the contract that {found[0].origin} brings: {type(exc).__name__}: {exc}") from exc


def _of_author(contract: str) -> tuple[Subject, Mapping[str, str]]:
    """Return the subject and the exclusions of a contract class, `module:Class`."""
    module, _, cls = contract.partition(":")
    try:
        from weights_core.testing.contracts import PluginContract
    except ImportError as exc:
        raise ExtraNotInstalledError(
            f"--contract needs pytest ({exc}): pip install 'weights-core[testing]'"
        ) from exc
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found = getattr(importlib.import_module(module), cls)
    except Exception as exc:  # importing a third party's module may raise anything
        raise PluginError(f"--contract {contract}: {type(exc).__name__}: {exc}") from exc
    finally:
        sys.path.remove(os.getcwd())
    if not (isinstance(found, type) and issubclass(found, PluginContract)):
        raise PluginError(f"--contract {contract} is no contract class")
    return found.subject(), found.exclusions
