# SPDX-License-Identifier: Apache-2.0
"""Put what a model takes unchanged straight into it, and leave to Transformers what it does something to.

For every tensor Transformers compiles a regular expression and makes several objects. Where all bytes are
in memory already, that takes half of the load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from weights_core.tensors import slots
from weights_transformers.stored import natural


def straight(cls: Any) -> Any:
    """Return a class to call `from_pretrained` of, which makes a `cls` and puts values in it by itself.

    It does so where `from_pretrained` has made the model and goes on to the state dict, and gives the method
    that it stands in for what is left. A class that has a method of its own for that is returned as it is.
    """
    from transformers import PreTrainedModel

    theirs = PreTrainedModel._load_pretrained_model
    if cls._load_pretrained_model is not theirs:
        return cls

    def make(_: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    def load(model: Any, state: Mapping[str, Any], files: Any, how: Any) -> Any:
        placed = {_place(*one) for one in _fitting(model, state, how)}
        info, offloaded = theirs(model, {n: v for n, v in state.items() if n not in placed}, files, how)
        info.missing_keys -= placed
        return info, offloaded

    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    own = {"__new__": make, "_load_pretrained_model": staticmethod(load)}
    return type(cls)(cls.__name__, (cls,), named | own)


def _fitting(model: Any, state: Mapping[str, Any], how: Any) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """Yield the values that have a tensor's name, shape and dtype, and where to put each of them."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    if how.dtype_plan or how.hf_quantizer is not None or how.device_mesh is not None:
        return
    mapping = how.weight_mapping or ()
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    known = {name: (place, key) for place, name, key in slots(model)}
    refs = {name: place[key] for name, (place, key) in known.items()}
    for name in sorted(refs.keys() & state.keys(), key=natural):
        ref, value = refs[name], state[name]
        is_alike = ref.is_meta and (ref.shape, ref.dtype) == (value.shape, value.dtype)
        if is_alike and type(ref) in (nn.Parameter, torch.Tensor):
            taken_as = rename_source_key(name, renamings, converters, model.base_model_prefix, refs)
            if taken_as == (name, None):
                yield name, value, *known[name]


def _place(name: str, value: Any, place: dict[str, Any], key: str) -> str:
    tensor = value[...]
    if isinstance(place[key], nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    tensor._is_hf_initialized = True  # else Transformers initialises it
    place[key] = tensor
    return name
