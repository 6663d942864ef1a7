# SPDX-License-Identifier: Apache-2.0
"""Getting model weights into an inference engine: the core that plugins and engines share.

    >>> import weights_core as w
    >>> report = w.load(w.TorchEngine(model), "path/to/checkpoint")

Importing this package imports no torch; `TorchEngine` does, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weights_core import errors
from weights_core.api import load, load_pipeline, open_session
from weights_core.engine import Engine
from weights_core.errors import Declined, LoadFailed, WeightsError
from weights_core.hookspecs import API_VERSION, hookimpl, hookspec
from weights_core.host import PluginHost
from weights_core.identity import Identity
from weights_core.lease import Lease
from weights_core.plugin import Plugin, ProviderPlugin, PublisherPlugin, WrapperPlugin
from weights_core.report import LoadReport
from weights_core.session import Session
from weights_core.source import Source
from weights_core.types import (
    Applied,
    Axis,
    EngineInfo,
    Fit,
    FormatClaim,
    Layout,
    LoadRequest,
    Outcome,
    Plan,
    PublishReceipt,
    Role,
    TensorMeta,
    Topology,
)
from weights_core.weightset import Target, WeightSet, WeightSetWrapper

if TYPE_CHECKING:
    from weights_core.torch_engine import TorchEngine

__all__ = [
    "API_VERSION",
    "Applied",
    "Axis",
    "Declined",
    "Engine",
    "EngineInfo",
    "Fit",
    "FormatClaim",
    "Identity",
    "Layout",
    "Lease",
    "LoadFailed",
    "LoadReport",
    "LoadRequest",
    "Outcome",
    "Plan",
    "Plugin",
    "PluginHost",
    "ProviderPlugin",
    "PublishReceipt",
    "PublisherPlugin",
    "Role",
    "Session",
    "Source",
    "Target",
    "TensorMeta",
    "Topology",
    "TorchEngine",
    "WeightSet",
    "WeightSetWrapper",
    "WeightsError",
    "WrapperPlugin",
    "errors",
    "hookimpl",
    "hookspec",
    "load",
    "load_pipeline",
    "open_session",
]


def __getattr__(name: str) -> object:
    """Import `TorchEngine`, and with it torch, only when it is asked for."""
    if name == "TorchEngine":
        from weights_core.torch_engine import TorchEngine

        return TorchEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
