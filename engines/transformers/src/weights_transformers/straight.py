# SPDX-License-Identifier: Apache-2.0
"""Put what a model takes unchanged straight into it, and leave to Transformers what it does something to.

For every tensor Transformers compiles a regular expression and makes several objects. Where all bytes are
in memory already, that takes a third of the load.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from weights_core import coverage
from weights_core.errors import CoverageError
from weights_transformers.arguments import is_tested

Bring: TypeAlias = Callable[[Collection[str]], Iterator[tuple[str, torch.Tensor]]]
"""Yields the tensors of some names, whole, in the order that is best for their source."""


def is_possible(cls: Any) -> bool:
    """Whether `cls` takes a state dict as Transformers does, in a version that was tested."""
    from transformers import PreTrainedModel

    method = cls._load_pretrained_model
    return is_tested("transformers") and method.__module__ in (PreTrainedModel.__module__, __name__)


@contextlib.contextmanager
def straight(cls: Any, values: Mapping[str, Any], bring: Bring) -> Iterator[None]:
    """Have `cls.from_pretrained(state_dict=values)` fill the model by `bring` as far as can be.

    While the block lasts, `cls` has a method of ours for the step that follows when the model is made. It
    gives what is left of `values`, and the state dicts of others, to Transformers' own. Does nothing where
    that is not possible. To be used by one thread at a time.

    Raises:
        CoverageError: out of `from_pretrained`: tensors have other shapes than the model's.
    """
    if not is_possible(cls):
        yield
        return
    theirs = cls._load_pretrained_model

    def load(model: Any, state: Any, files: Any, how: Any) -> Any:
        if state is not values:
            return theirs(model, state, files, how)
        fitting = _fitting(model, values, how)
        for source, tensor in bring(fitting.keys()):
            _place(model, fitting[source], tensor)
        rest = {name: value for name, value in values.items() if name not in fitting}
        with contextlib.nullcontext() if rest else _without_bar():
            info, offloaded = theirs(model, rest, files, how)
        info.missing_keys.difference_update(fitting.values())
        if not how.ignore_mismatched_sizes:
            _check_sizes(info)
        return info, offloaded

    cls._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        del cls._load_pretrained_model


def _check_sizes(info: Any) -> None:
    """Refuse what Transformers is about to refuse, which tells which tensors in its log alone.

    Raises:
        CoverageError: tensors of the checkpoint have other shapes than the model's.
    """
    found = {name: coverage.unlike(stored, due) for name, stored, due in sorted(info.mismatched_keys)}
    if found:
        raise CoverageError(
            f"the checkpoint does not fit the model's configuration: {coverage.described(found)}; "
            "ignore_mismatched_sizes=True makes new ones instead",
            mismatched=found,
        )


def _fitting(model: Any, values: Mapping[str, Any], how: Any) -> dict[str, str]:
    """Return the names in the model of those values that are all that a tensor is made of, as it is.

    Names are found as at the beginning of Transformers' `convert_and_load_state_dict_in_model`.
    """
    from transformers.core_model_loading import (
        GroupWeightRename,
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )

    mapping = how.weight_mapping or ()
    if any(isinstance(one, GroupWeightRename) for one in mapping):  # what it does depends on what it has done
        return {}
    if how.dtype_plan or how.hf_quantizer is not None or how.device_mesh is not None:
        return {}
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    held = model.state_dict()
    rename = functools.partial(
        rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=held
    )
    sources: dict[str, list[str]] = {}
    converted: set[str] = set()
    for name in sorted(values, key=dot_natural_key):
        target, pattern = rename(name, renamings, converters)
        if target not in held and name in held:
            target, pattern = rename(name, [], [])
        sources.setdefault(target, []).append(name)
        if pattern is not None:
            converted.add(target)
    return {
        names[0]: target
        for target, names in sources.items()
        if len(names) == 1 and target not in converted and _is_alike(held.get(target), values[names[0]])
    }


def _is_alike(held: Any, value: Any) -> bool:
    is_plain = type(held) is torch.Tensor and held.is_meta
    return is_plain and held.shape == value.shape and held.dtype == value.dtype


@torch.no_grad()
def _place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where Transformers' `set_param_for_module` does, as it does."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key not in module._buffers:
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # else it is initialised
    setattr(module, key, tensor)


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Have Transformers show no progress of nothing; the hook is the process's."""
    from transformers.utils import logging

    def hidden(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **kwargs | {"disable": True})

    before = logging.set_tqdm_hook(hidden)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
