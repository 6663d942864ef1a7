# SPDX-License-Identifier: Apache-2.0
"""The contract kit: prove a plugin, clause by clause; and helpers for testing plugins and engines.

Install it with `pip install "weights-core[testing]"`. Not a pytest plugin that is there by itself:
a test module imports the contracts, and `pytest_plugins = ["weights_core.testing.fixtures"]` in a
`conftest.py` gives the fixtures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights_core.testing.checkpoints import every_dtype, random_tensor, write_checkpoint, zoo
    from weights_core.testing.contracts import (
        OwnerContract,
        PluginContract,
        PublisherContract,
        SourceContract,
        WrapperContract,
    )
    from weights_core.testing.engines import FakeEngine
    from weights_core.testing.hosts import host_of, installed_as
    from weights_core.testing.leftovers import Held
    from weights_core.testing.ranks import Group
    from weights_core.testing.recorder import HookRecorder

__all__ = [
    "FakeEngine",
    "Group",
    "Held",
    "HookRecorder",
    "OwnerContract",
    "PluginContract",
    "PublisherContract",
    "SourceContract",
    "WrapperContract",
    "every_dtype",
    "host_of",
    "installed_as",
    "random_tensor",
    "write_checkpoint",
    "zoo",
]

_MODULES = {
    "checkpoints": ("every_dtype", "random_tensor", "write_checkpoint", "zoo"),
    "contracts": (
        "OwnerContract",
        "PluginContract",
        "PublisherContract",
        "SourceContract",
        "WrapperContract",
    ),
    "engines": ("FakeEngine",),
    "hosts": ("host_of", "installed_as"),
    "leftovers": ("Held",),
    "ranks": ("Group",),
    "recorder": ("HookRecorder",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for: only the contracts need pytest."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
