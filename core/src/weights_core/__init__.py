# SPDX-License-Identifier: Apache-2.0
"""Getting model weights into an inference engine: the core that plugins and engines share.

    >>> import weights_core as w
    >>> report = w.load(w.TorchEngine(model), "path/to/checkpoint")

Importing this package imports next to nothing: a name's module is imported when the name is first
used. Only `TorchEngine` and what needs tensors import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weights_core import errors
    from weights_core.api import explain, load, load_pipeline, open_session
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
    from weights_core.torch_engine import TorchEngine
    from weights_core.types import (
        Applied,
        Axis,
        EngineInfo,
        Fit,
        FormatClaim,
        Layout,
        LoadRequest,
        Outcome,
        Part,
        Plan,
        PublishReceipt,
        Role,
        TensorMeta,
        Topology,
    )
    from weights_core.weightset import Target, WeightSet, WeightSetWrapper

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
    "Part",
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
    "explain",
    "hookimpl",
    "hookspec",
    "load",
    "load_pipeline",
    "open_session",
]


_MODULES = {
    "api": (
        "explain",
        "load",
        "load_pipeline",
        "open_session",
    ),
    "engine": ("Engine",),
    "errors": (
        "Declined",
        "LoadFailed",
        "WeightsError",
    ),
    "hookspecs": (
        "API_VERSION",
        "hookimpl",
        "hookspec",
    ),
    "host": ("PluginHost",),
    "identity": ("Identity",),
    "lease": ("Lease",),
    "plugin": (
        "Plugin",
        "ProviderPlugin",
        "PublisherPlugin",
        "WrapperPlugin",
    ),
    "report": ("LoadReport",),
    "session": ("Session",),
    "source": ("Source",),
    "torch_engine": ("TorchEngine",),
    "types": (
        "Applied",
        "Axis",
        "EngineInfo",
        "Fit",
        "FormatClaim",
        "Layout",
        "LoadRequest",
        "Outcome",
        "Part",
        "Plan",
        "PublishReceipt",
        "Role",
        "TensorMeta",
        "Topology",
    ),
    "weightset": (
        "Target",
        "WeightSet",
        "WeightSetWrapper",
    ),
}


def __getattr__(name: str) -> object:
    """Import the module of a public name when the name is first used (PEP 562)."""
    from importlib import import_module

    if name == "errors":
        return import_module("weights_core.errors")
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"weights_core.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
