# SPDX-License-Identifier: Apache-2.0
"""Tensors that an engine made, as a set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from types import MappingProxyType

import torch

from weights_core import dtypes
from weights_core.tensors import nbytes
from weights_core.types import Layout, TensorMeta
from weights_core.weightset import Slices, WeightSet, normalise


class DerivedSet(WeightSet):
    """The tensors of a dict. Releasing takes them out of that very dict."""

    def __init__(self, tensors: MutableMapping[str, torch.Tensor], *, layout: Layout, provider: str) -> None:
        """Adopt the dict.

        Raises:
            TypeError: a value is no tensor, or of a dtype that weights do not have.
        """
        self.layout = layout
        self.provider = provider
        self._tensors = tensors
        self._metas = MappingProxyType({name: _meta(name, tensor) for name, tensor in tensors.items()})

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """In the order of the dict."""
        return self._metas

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return the tensor itself, or a view of it."""
        tensor = self._tensors[name]
        for dim, r in enumerate(normalise(slices, tuple(tensor.shape))):
            tensor = tensor.narrow(dim, r.start, len(r))
        return tensor

    def release(self, names: Iterable[str]) -> int:
        """Take tensors out of the dict."""
        for name in names:
            self._tensors.pop(name, None)
        return 0

    def close(self) -> None:
        """Let go of the dict, which is the engine's."""
        self._tensors = {}


def _meta(name: str, tensor: object) -> TensorMeta:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}, need a tensor")
    try:
        dtype = dtypes.from_torch(tensor.dtype)
    except KeyError:
        raise TypeError(f"{name!r} has dtype {tensor.dtype}, which weights do not have") from None
    return TensorMeta(name, dtypes.stored_shape(dtype, tuple(tensor.shape)), dtype, nbytes(tensor))
