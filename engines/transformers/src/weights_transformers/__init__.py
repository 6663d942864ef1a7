# SPDX-License-Identifier: Apache-2.0
"""Transformers models and diffusers pipelines, with their weights brought by weights-core.

    >>> from weights_transformers import from_pretrained
    >>> model = from_pretrained(AutoModelForCausalLM, "path/to/llama", format="gms")

Importing this package imports neither torch nor Transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weights_transformers.api import Loaded, from_pretrained, load, open_engine
    from weights_transformers.pipeline import LoadedPipeline, load_pipeline, pipeline_from_pretrained

__all__ = [
    "Loaded",
    "LoadedPipeline",
    "from_pretrained",
    "load",
    "load_pipeline",
    "open_engine",
    "pipeline_from_pretrained",
]

_MODULES = {
    "api": ("Loaded", "from_pretrained", "load", "open_engine"),
    "pipeline": ("LoadedPipeline", "load_pipeline", "pipeline_from_pretrained"),
}


def __getattr__(name: str) -> object:
    """Import the module of a public name when the name is first used (PEP 562)."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"weights_transformers.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
