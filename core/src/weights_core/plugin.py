# SPDX-License-Identifier: Apache-2.0
"""Typed bases for plugin classes. Optional: any class with the right hooks is a plugin.

What they give: the constructor, and a type checker's complaint about a hook whose parameters
differ from the specification.
"""

from __future__ import annotations

import abc
from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from weights_core.hookspecs import API_VERSION, hookimpl

if TYPE_CHECKING:
    from weights_core.engine import Engine
    from weights_core.source import Source
    from weights_core.types import FormatClaim, Layout, LoadRequest, PublishReceipt
    from weights_core.weightset import WeightSet

ConfigT = TypeVar("ConfigT")


class Plugin(abc.ABC, Generic[ConfigT]):
    """A plugin: one instance is made for each load, with that load's settings.

    `Config` is an attrs class of settings with defaults, or None if there are none.
    """

    weights_api: ClassVar[int] = API_VERSION
    Config: ClassVar[type | None] = None

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @hookimpl
    @abc.abstractmethod
    def resolve_format(self, request: LoadRequest) -> FormatClaim | None:
        """See `weights_core.hookspecs.resolve_format`."""


class ProviderPlugin(Plugin[ConfigT]):
    """A plugin that provides weights: a source, or an owner that gets them from `source`."""

    @hookimpl
    @abc.abstractmethod
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        """See `weights_core.hookspecs.load_weights`."""


class WrapperPlugin(Plugin[ConfigT]):
    """A plugin that wraps what a source returned; implement with `hookimpl(wrapper=True)`."""

    @hookimpl(wrapper=True)
    @abc.abstractmethod
    def load_weights(self, request: LoadRequest) -> Generator[None, WeightSet, WeightSet]:
        """See `weights_core.hookspecs.load_weights`."""


class PublisherPlugin(Plugin[ConfigT]):
    """A plugin that offers loaded weights to others."""

    @hookimpl
    @abc.abstractmethod
    def publish(self, request: LoadRequest, engine: Engine, layout: Layout) -> PublishReceipt | None:
        """See `weights_core.hookspecs.publish`."""
