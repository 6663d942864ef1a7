# SPDX-License-Identifier: Apache-2.0
"""The engine of a model that Transformers itself must fill: one that it quantises as it loads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from weights_core import Applied, Engine, EngineInfo, Layout, TensorMeta, WeightSet, coverage, dtypes
from weights_core.errors import EngineError, WeightsError
from weights_core.tensors import empty, nbytes
from weights_core.weightset import normalise
from weights_transformers.trace import INITIALISED
from weights_transformers.traced import Value, slices_of


class DirectEngine(Engine):
    """Has `from_pretrained` read the set, value by value, in the CHECKPOINT layout.

    `model` is None until the load. What Transformers makes of the weights is its own business, so
    nothing is shared.
    """

    def __init__(
        self, build: Callable[[dict[str, Any]], tuple[Any, Mapping[str, Any]]], info: EngineInfo
    ) -> None:
        """Describe a model that `build` makes of a state dict."""
        self.model: Any = None
        self._build = build
        self._info = info
        self._found: dict[str, TensorMeta] = {}

    @property
    def info(self) -> EngineInfo:
        """What the constructor was given."""
        return self._info

    @property
    def anchor(self) -> object:
        """The model, once there is one."""
        return self if self.model is None else self.model

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return the tensors that the model came to have."""
        del layout
        return self._found

    def apply(self, weights: WeightSet) -> Applied:
        """Build the model; what was read whole is released at once, the rest when the model stands.

        Raises:
            EngineError: Transformers refuses, or leaves a tensor without memory.
        """
        reader = _Reader(weights)
        try:
            model, info = self._build(
                {name: Value(meta, reader.take) for name, meta in weights.metas.items()}
            )
        except Exception as exc:
            if reader.error is not None and reader.error is not exc:  # Transformers tells it in other words
                raise reader.error from exc
            raise
        tensors = itertools.chain(model.named_parameters(), model.named_buffers())
        bare = [name for name, tensor in tensors if tensor.is_meta]
        if bare:
            raise EngineError(f"Transformers left {coverage.listed(bare)} without memory")
        weights.release(reader.cut)
        self.model = model
        self._found = {
            name: _meta(name, tensor)
            for name, tensor in model.state_dict().items()
            if isinstance(tensor, torch.Tensor)
        }
        missing = self._found.keys() & {str(name) for name in info["missing_keys"]}
        return Applied(
            written=self._found.keys() - missing,
            defaulted=dict.fromkeys(sorted(missing), INITIALISED),
            unused=[name for name in weights.metas if name not in reader.asked],
            host_bytes=reader.kept,
        )

    def untouched(self) -> bool:
        """A model that could not be built leaves nothing behind."""
        return self.model is None

    def reinit(self) -> None:
        """Drop the model."""
        self.model, self._found = None, {}


class _Reader:
    """Reads values into memory of their own, one at a time whichever thread asks."""

    def __init__(self, weights: WeightSet) -> None:
        self.asked: set[str] = set()
        self.cut: set[str] = set()
        self.kept = 0
        self.error: WeightsError | None = None
        self._weights = weights
        self._lock = threading.Lock()

    def take(self, meta: TensorMeta, index: Any) -> torch.Tensor:
        slices = slices_of(index)
        ranges = normalise(slices or None, meta.torch_shape)
        shape = tuple(len(chosen) for chosen in ranges)
        is_whole = shape == meta.torch_shape
        out = empty(shape, dtypes.to_torch(meta.dtype), offset=meta.offset if is_whole else None)
        with self._lock:
            try:
                self._weights.read_into(meta.name, out, None if is_whole else slices)
            except WeightsError as exc:
                self.error = self.error or exc
                raise
            self.asked.add(meta.name)
            self.kept += out.nbytes
            if is_whole:
                self._weights.release([meta.name])
                self.cut.discard(meta.name)
            else:
                self.cut.add(meta.name)
        return out if slices is not None else out[index]


def _meta(name: str, tensor: torch.Tensor) -> TensorMeta:
    """Describe a tensor; one of a dtype or class that no checkpoint holds, by its bytes."""
    size = nbytes(tensor)
    try:
        dtype = dtypes.from_torch(tensor.dtype)
    except KeyError:
        return TensorMeta(name, (size,), "U8", size)
    return TensorMeta(name, dtypes.stored_shape(dtype, tuple(tensor.shape)), dtype, size)
