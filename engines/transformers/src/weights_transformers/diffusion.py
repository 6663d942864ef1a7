# SPDX-License-Identifier: Apache-2.0
"""A model of diffusers on meta, and how its tensors come about: by name, converted as diffusers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from weights_core import coverage
from weights_core.errors import CoverageError, EngineError
from weights_core.tensors import slots
from weights_transformers.alone import ALONE
from weights_transformers.recipes import Held, Pieces, Recipe, part
from weights_transformers.trace import INITIALISED, Trace

if TYPE_CHECKING:
    from pathlib import Path

    from weights_core import TensorMeta


def blueprint(cls: Any, folder: Path, metas: Mapping[str, TensorMeta], dtype: torch.dtype | None) -> Trace:
    """Return the model that `cls.from_pretrained(folder, dtype=dtype)` builds, before its weights.

    Raises:
        EngineError: diffusers refuses its configuration.
        CoverageError: the checkpoint's tensors have other shapes than that says.
    """
    try:
        model = _built(cls, folder, dtype)
    except Exception as exc:  # diffusers may raise anything
        raise EngineError(f"diffusers refuses to build {cls.__name__}: {type(exc).__name__}: {exc}") from exc
    sources = {name: name for name in metas}
    if len({meta.file for meta in metas.values()}) == 1:  # as diffusers: what is in shards is not that old
        model._fix_state_dict_keys_on_load(sources)
    recipes: dict[str, Recipe] = {}
    held: dict[str, str] = {}
    mismatched: dict[str, str] = {}
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old one too, so that its id stays its
    for place, name, key in slots(model):
        old = place[key]
        if id(old) not in done:
            recipe: Pieces | Held | None = None
            if name in sources:
                stored = part(metas[sources[name]])
                if stored.shape != tuple(old.shape):
                    mismatched[sources[name]] = coverage.unlike(stored.shape, old.shape)
                recipe = attrs.evolve(stored, dtype=_dtype(cls, name, stored.dtype, old.dtype, dtype))
            elif not old.is_meta:
                recipe, held[name] = Held(old.detach()), INITIALISED
            if recipe is not None:
                recipes[name] = recipe
            blank = _blank(old, old.dtype if recipe is None or isinstance(recipe, Held) else recipe.dtype)
            done[id(old)] = old, blank
            done[id(blank)] = blank, blank  # where modules are shared, it is met again
        place[key] = done[id(old)][1]
    if mismatched:
        raise CoverageError(
            f"the checkpoint in {folder} does not fit its config.json: {coverage.described(mismatched)}",
            mismatched=mismatched,
        )
    return Trace(model, recipes, {}, held)


def _built(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    config = cls.load_config(folder, local_files_only=True)
    with ALONE, _default_dtype(dtype), no_init_weights(), init_empty_weights():  # buffers are computed
        model = cls.from_config(config)
    model.register_to_config(_name_or_path=str(folder))
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dtype(
    cls: Any, name: str, stored: torch.dtype, built: torch.dtype, asked: torch.dtype | None
) -> torch.dtype:
    """Return what a tensor is converted to: float32 in modules that are kept so, whatever was asked for."""
    if asked is None or not stored.is_floating_point:
        return built
    kept = cls._keep_in_fp32_modules or ()
    kept = [kept] if isinstance(kept, str) else kept
    return torch.float32 if any(module in name.split(".") for module in kept) else asked


def _blank(old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    blank = torch.empty(old.shape, dtype=dtype, device="meta")
    return nn.Parameter(blank, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else blank
