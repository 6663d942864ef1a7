# SPDX-License-Identifier: Apache-2.0
"""What a model holds beside tensors: a reader who is given the tensors alone would miss a change of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

_MODULE = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_PLAIN = (bool, int, float, str, type(None))


def beside_tensors(model: nn.Module) -> dict[str, object]:
    """Return the attributes of a model's modules and parameters, by name, as far as they compare."""
    found: dict[str, object] = {}
    for prefix, module in model.named_modules():
        found |= {f"{prefix}.{name}": value for name, value in _attributes(vars(module), _MODULE)}
    for prefix, parameter in model.named_parameters():
        found |= {f"{prefix}.{name}": value for name, value in _attributes(vars(parameter), frozenset())}
        found[prefix] = id(parameter)
    return found


def _attributes(given: Mapping[str, object], skipped: frozenset[str]) -> Iterator[tuple[str, object]]:
    for name, value in given.items():
        if name in skipped:
            continue
        if isinstance(value, _PLAIN):
            yield name, repr(value)  # not a number is not equal to itself
        elif isinstance(value, dict | list | set):
            yield name, (type(value), len(value))
        else:
            yield name, type(value)
