# SPDX-License-Identifier: Apache-2.0
"""The engine of a model that Transformers itself fills: one that it quantises, or that needs no trace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch.distributed.tensor import DTensor

from weights_core import Applied, Engine, EngineInfo, Layout, Target, TensorMeta, WeightSet, coverage, dtypes
from weights_core.errors import EngineError
from weights_core.tensors import empty, named_tensors, nbytes
from weights_core.weightset import Slices, normalise
from weights_transformers.blocks import Blocks
from weights_transformers.collectives import Collectives
from weights_transformers.engine import nothing_fits
from weights_transformers.ranks import Ranks
from weights_transformers.straight import Bring
from weights_transformers.trace import INITIALISED
from weights_transformers.traced import Value, slices_of

Build = Callable[[dict[str, Any], Bring], tuple[Any, Mapping[str, Any]]]


class DirectEngine(Engine):
    """Has `from_pretrained` read the set, value by value, in the CHECKPOINT layout.

    `model` is None until the load. What Transformers makes of the weights is its own business, so
    nothing is shared.
    """

    def __init__(
        self,
        build: Build,
        info: EngineInfo,
        ranks: Ranks | None = None,
        block: Sequence[int] | None = None,
        *,
        is_plain: bool = False,
        map_files: bool = True,
    ) -> None:
        """Describe a model that `build` makes of a state dict, spread over `ranks` if there are any.

        `block` is the size of the blocks that have a scale each, if there are such. A model that `is_plain`
        has the tensors of the checkpoint: with `map_files` where they lie in the files, if that can be.
        """
        self.model: Any = None
        self._build = build
        self._info = info if ranks is None else attrs.evolve(info, topology=ranks.topology)
        self._ranks = ranks
        self._block = block if ranks is not None else None
        self._is_plain = is_plain
        self._map_files = map_files
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
            CoverageError: tensors have other shapes than the model's, or nothing of the set is the model's.
            RanksDisagreeError: another rank has failed.
        """
        reader = _Reader(weights, Blocks(self._block, weights.metas), map_files=self._map_files)
        model, info = self._built(reader, weights.metas)
        weights.release(reader.cut)
        if weights.metas and not reader.asked:
            raise nothing_fits(type(model), weights.metas)
        self.model = model
        self._found = {name: _meta(name, tensor) for name, tensor in named_tensors(model).items()}
        kept = {
            *map(str, info["missing_keys"]),
            *(str(entry[0]) for entry in info.get("mismatched_keys", ())),
        }
        missing = self._found.keys() & kept
        return Applied(
            written=self._found.keys() - missing,
            defaulted=dict.fromkeys(sorted(missing), INITIALISED),
            unused=[name for name in weights.metas if name not in reader.asked],
            host_bytes=reader.kept,
        )

    def tensors(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """Return the model's parameters and persistent buffers, if they are the checkpoint's.

        Raises:
            EngineError: Transformers may have made something else of the weights.
        """
        if not self._is_plain or self.model is None:
            return super().tensors(layout)
        return named_tensors(self.model)

    def untouched(self) -> bool:
        """A model that could not be built leaves nothing behind."""
        return self.model is None

    def reinit(self) -> None:
        """Drop the model."""
        self.model, self._found = None, {}

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Ask the other ranks, if there are any."""
        return [value] if self._ranks is None else self._ranks.gather(value, timeout)

    def _built(self, reader: _Reader, metas: Mapping[str, TensorMeta]) -> tuple[Any, Mapping[str, Any]]:
        """Build, and raise what went wrong first: Transformers tells it in other words."""
        values = {name: Value(meta, reader.take) for name, meta in metas.items()}
        calls = None if self._ranks is None else Collectives(self._ranks)
        try:
            with calls or contextlib.nullcontext():
                built = self._build(values, reader.bring)
            found = (calls.error if calls is not None else None) or reader.blocks.fault() or _bare(built[0])
            if found is not None:  # Transformers has not noticed
                raise found
        except Exception as exc:
            told = calls.error if calls is not None else None
            error = reader.error or told or exc
            if calls is not None:
                calls.end(error)
            if error is exc:
                raise
            raise error from exc
        if calls is not None:
            calls.end(None)
        return built


class _Reader:
    """Reads values into memory of their own, one at a time whichever thread asks; or brings many."""

    def __init__(self, weights: WeightSet, blocks: Blocks, *, map_files: bool) -> None:
        self.asked: set[str] = set()
        self.cut: set[str] = set()
        self.kept = 0
        self.error: Exception | None = None
        self.blocks = blocks
        self._weights = weights
        self._map_files = map_files
        self._lock = threading.Lock()

    def take(self, meta: TensorMeta, index: Any) -> torch.Tensor:
        slices = slices_of(index)
        ranges = normalise(slices or None, meta.torch_shape)
        with self._lock:
            if self.error is not None:  # Transformers goes on with the next
                raise self.error
            try:
                out = self._read(meta, slices, ranges)
            except Exception as exc:
                self.error = exc
                raise
            self.asked.add(meta.name)
            self.kept += out.nbytes
        return out if slices is not None else out[index]

    def bring(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors, mapped if they may be, else filled by as many threads as the source has."""
        try:
            for name, tensor in self._brought(names):
                self.asked.add(name)
                self.kept += tensor.nbytes
                yield name, tensor
            self._weights.release(names)
        except Exception as exc:
            self.error = exc
            raise

    def _brought(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        left = dict.fromkeys(names)
        if self._map_files:
            for name, tensor in self._weights.mapped(names):
                del left[name]
                yield name, tensor
        metas = (self._weights.meta(name) for name in left)
        targets = [
            Target(meta.name, empty(meta.torch_shape, dtypes.to_torch(meta.dtype), offset=meta.offset))
            for meta in metas
        ]
        for target in self._weights.fill(targets) if targets else ():
            yield target.name, target.out

    def _read(self, meta: TensorMeta, slices: Slices | None, ranges: tuple[range, ...]) -> torch.Tensor:
        shape = tuple(len(chosen) for chosen in ranges)
        is_whole = shape == meta.torch_shape
        out = empty(shape, dtypes.to_torch(meta.dtype), offset=meta.offset if is_whole else None)
        self.blocks.note(meta.name, ranges)
        self._weights.read_into(meta.name, out, None if is_whole else slices)
        if is_whole:
            self._weights.release([meta.name])
            self.cut.discard(meta.name)
        else:
            self.cut.add(meta.name)
        return out


def _bare(model: Any) -> EngineError | None:
    """Return the error of a model whose tensors have not all got memory."""
    bare = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.is_meta
    ]
    return EngineError(f"Transformers left {coverage.listed(bare)} without memory") if bare else None


def _meta(name: str, tensor: torch.Tensor) -> TensorMeta:
    """Describe a tensor, of one that is spread this rank's part; what no checkpoint holds, by its bytes."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    size = nbytes(tensor)
    try:
        dtype = dtypes.from_torch(tensor.dtype)
    except KeyError:
        return TensorMeta(name, (size,), "U8", size)
    return TensorMeta(name, dtypes.stored_shape(dtype, tuple(tensor.shape)), dtype, size)
