# SPDX-License-Identifier: Apache-2.0
"""Put what a model takes unchanged straight into it, and leave to Transformers what it does something to.

For every tensor Transformers compiles a regular expression and makes several objects. Where all bytes are
in memory already, that takes half of the load.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from weights_core.tensors import slots

Bring: TypeAlias = Callable[[Collection[str]], Iterator[tuple[str, torch.Tensor]]]
"""Yields the tensors of some names, whole, in the order that is best for their source."""
Slot: TypeAlias = tuple[dict[str, Any], str]
"""Where a tensor hangs: a module's dict, and the key there."""


def straight(cls: Any, bring: Bring) -> Any:
    """Return a class to call `from_pretrained` of, which makes a `cls` and has it filled by `bring`.

    That is done where `from_pretrained` has made the model and goes on to the state dict; what is left of
    that goes to the method that is stood in for. Of a class with a method of its own for that, it is `cls`.
    """
    from transformers import PreTrainedModel

    theirs = PreTrainedModel._load_pretrained_model
    if cls._load_pretrained_model is not theirs:
        return cls

    def make(_: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    def load(model: Any, state: Mapping[str, Any], files: Any, how: Any) -> Any:
        fitting = _fitting(model, state, how)
        for source, tensor in bring(fitting.keys()):
            _place(tensor, *fitting[source][1])
        rest = {name: value for name, value in state.items() if name not in fitting}
        info, offloaded = theirs(model, rest, files, how)
        info.missing_keys.difference_update(target for target, _ in fitting.values())
        return info, offloaded

    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    own = {"__new__": make, "_load_pretrained_model": staticmethod(load)}
    return type(cls)(cls.__name__, (cls,), named | own)


def _fitting(model: Any, state: Mapping[str, Any], how: Any) -> dict[str, tuple[str, Slot]]:
    """Return which values are all that a tensor of the model is made of, and are as it is; its name, and slot."""
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


def _place(tensor: torch.Tensor, place: dict[str, Any], key: str) -> None:
    if isinstance(place[key], nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # else Transformers initialises it
    place[key] = tensor
