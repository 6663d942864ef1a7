# SPDX-License-Identifier: Apache-2.0
"""Weights already cut per rank: each rank gets its own shard, from disk or from a peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weights_presharded.converting import Made, shard
    from weights_presharded.plan import Plan, PlanError, read_plan
    from weights_presharded.saving import save

__all__ = ["Made", "Plan", "PlanError", "read_plan", "save", "shard"]

_HOME = {
    "Made": "converting",
    "Plan": "plan",
    "PlanError": "plan",
    "read_plan": "plan",
    "save": "saving",
    "shard": "converting",
}


def __getattr__(name: str) -> object:
    """Import what is asked for: the plugin itself needs none of it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
