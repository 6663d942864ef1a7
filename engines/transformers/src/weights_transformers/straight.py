# SPDX-License-Identifier: Apache-2.0
"""Put what a model takes unchanged straight into it, and leave to Transformers what it does something to.

For every tensor Transformers compiles a regular expression and makes several objects. Where all bytes are
in memory already, that takes half of the load.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from weights_core.tensors import slots
from weights_transformers.arguments import is_tested

Bring: TypeAlias = Callable[[Collection[str]], Iterator[tuple[str, torch.Tensor]]]
"""Yields the tensors of some names, whole, in the order that is best for their source."""
Slot: TypeAlias = tuple[dict[str, Any], str]
"""Where a tensor hangs: a module's dict, and the key there."""


def is_possible(cls: Any) -> bool:
    """Whether it is known how `cls` goes on once the model is made: not of versions that were not tested."""
    from transformers import PreTrainedModel

    return is_tested("transformers") and cls._load_pretrained_model is PreTrainedModel._load_pretrained_model


def straight(cls: Any, bring: Bring) -> Any:
    """Return a class to call `from_pretrained` of, which makes a `cls` and has it filled by `bring`.

    That is done where `from_pretrained` has made the model and goes on to the state dict; what is left of
    that goes to the method that is stood in for. It is `cls` itself where that is not possible.
    """
    if not is_possible(cls):
        return cls
    theirs = cls._load_pretrained_model

    def make(_: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    def load(model: Any, state: Mapping[str, Any], files: Any, how: Any) -> Any:
        fitting = _fitting(model, state, how)
        for source, tensor in bring(fitting.keys()):
            _place(tensor, *fitting[source][1])
        rest = {name: value for name, value in state.items() if name not in fitting}
        with contextlib.nullcontext() if rest else _without_bar():
            info, offloaded = theirs(model, rest, files, how)
        info.missing_keys.difference_update(target for target, _ in fitting.values())
        return info, offloaded

    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    own = {"__new__": make, "_load_pretrained_model": staticmethod(load)}
    return type(cls)(cls.__name__, (cls,), named | own)


def _fitting(model: Any, state: Mapping[str, Any], how: Any) -> dict[str, tuple[str, Slot]]:
    """Return which values each are all that a tensor of the model is made of, as it is; its name and slot."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    if how.dtype_plan or how.hf_quantizer is not None or how.device_mesh is not None:
        return {}
    mapping = how.weight_mapping or ()
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    known: dict[str, Slot] = {name: (place, key) for place, name, key in slots(model)}
    refs = {name: place[key] for name, (place, key) in known.items()}
    rename = functools.partial(
        rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=refs
    )
    sources: dict[str, list[str | None]] = {}
    for name in state:
        target, pattern = rename(name, renamings, converters)
        if target not in refs and name in refs:
            target, pattern = rename(name, [], [])
        sources.setdefault(target, []).append(None if pattern else name)
    return {
        source: (target, known[target])
        for target, (source, *others) in sources.items()
        if source is not None and not others and target in refs and _is_alike(refs[target], state[source])
    }


def _is_alike(ref: torch.Tensor, value: Any) -> bool:
    is_plain = type(ref) in (nn.Parameter, torch.Tensor) and ref.is_meta
    return is_plain and ref.shape == value.shape and ref.dtype == value.dtype


@torch.no_grad()
def _place(tensor: torch.Tensor, place: dict[str, Any], key: str) -> None:
    if isinstance(place[key], nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # else Transformers initialises it
    place[key] = tensor


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Have Transformers show no progress of nothing."""
    from transformers.utils import logging

    def hidden(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **kwargs | {"disable": True})

    before = logging.set_tqdm_hook(hidden)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
