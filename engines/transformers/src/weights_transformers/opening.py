# SPDX-License-Identifier: Apache-2.0
"""A model that is about to be loaded, and the engines that can do it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import weights_core as w
from weights_core import PluginHost, dtypes
from weights_core.checkpoint import CheckpointFiles
from weights_core.errors import WeightsError
from weights_core.shards import open_shards
from weights_transformers import arguments as given
from weights_transformers.alone import ALONE, in_one_thread
from weights_transformers.cut import find_whole
from weights_transformers.direct import DirectEngine
from weights_transformers.engine import SHAREABLE, TransformersEngine
from weights_transformers.plain import stored_as_needed
from weights_transformers.ranks import Ranks, opened_together, ranks_of
from weights_transformers.straight import Bring, is_possible, straight
from weights_transformers.trace import UntraceableError, refused, trace

log = logging.getLogger("weights.transformers")


@attrs.frozen(eq=False, slots=False)
class Opened:
    """A checkpoint and the class it is for; `arguments` are left for `from_pretrained`."""

    found: CheckpointFiles
    cls: Any
    settings: Any
    arguments: Mapping[str, Any]
    quantization: str | None
    block: Sequence[int] | None

    @functools.cached_property
    def metas(self) -> Mapping[str, w.TensorMeta]:
        """What the checkpoint holds; raises as `headers`."""
        return headers(self.found)

    def __str__(self) -> str:
        """Say what all ranks must see alike."""
        held = sorted((name, meta.dtype, tuple(meta.shape)) for name, meta in self.metas.items())
        digest = hashlib.sha256(repr(held).encode()).hexdigest()[:12]
        kind = (
            f"{self.cls.__name__}, quantised by {self.quantization}"
            if self.quantization
            else self.cls.__name__
        )
        return f"{kind}, of {len(held)} tensors ({digest})"


@attrs.frozen(eq=False)
class Opening:
    """What `open_engine` found, and what it was asked for."""

    opened: Opened
    info: w.EngineInfo
    """What an engine says of itself that only Transformers can fill."""
    ranks: Ranks | None
    map_files: bool
    asked: Mapping[str, Any]
    is_auto: bool

    @property
    def dtype(self) -> str | None:
        """What every weight is stored as if none is converted, or None if that is not certain."""
        opened = self.opened
        if self.ranks is not None or self.info.device != "cpu" or opened.quantization is not None:
            return None
        if not is_possible(opened.cls):
            return None
        return stored_as_needed(opened.cls, opened.settings, opened.arguments)

    def engine(self) -> TransformersEngine | DirectEngine:
        """Return the engine that can do most: a traced one, if the model can be traced.

        Raises:
            EngineError: Transformers refuses.
            CoverageError: tensors of the checkpoint have other shapes than the model's.
            CheckpointError: a file is malformed.
        """
        opened, metas = self.opened, self.opened.metas
        if opened.quantization is None:
            try:
                traced = trace(opened.cls, opened.settings, metas, opened.arguments)
            except UntraceableError as exc:
                log.warning("%s cannot share its weights: %s", opened.cls.__name__, exc.brief)
            else:
                self._finish(traced.model)
                return TransformersEngine(
                    traced,
                    version=self.info.version,
                    device=self.info.device,
                    role=self.info.role,
                    component=self.info.component,
                    map_files=self.map_files,
                    ranks=self.ranks,
                )
        return DirectEngine(self._build, self.info, self.ranks, opened.block)

    def plain(self, dtype: str) -> DirectEngine:
        """Return the engine of a model whose weights are all used as they are stored, as `dtype`.

        It is the quickest, and nobody can share with it. It says that it takes and shares what a traced one
        does, so that the plan shows who would take part.
        """
        info = attrs.evolve(
            self.info,
            dtype=dtype,
            accepts={w.Layout.CHECKPOINT, w.Layout.SHARDED},
            shareable={w.Layout.SHARDED: SHAREABLE},
        )
        return DirectEngine(self._build_straight, info, is_plain=True, map_files=self.map_files)

    def _build_straight(self, values: dict[str, Any], bring: Bring) -> tuple[Any, Mapping[str, Any]]:
        with in_one_thread(), straight(self.opened.cls, values, bring):
            return self._from_pretrained(values)

    def _build(self, values: dict[str, Any], bring: Bring) -> tuple[Any, Mapping[str, Any]]:
        del bring  # Transformers makes something else of each
        with ALONE:
            return self._from_pretrained(values)

    def _from_pretrained(self, values: dict[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        opened = self.opened
        state = torch.get_rng_state()
        try:
            model, info = opened.cls.from_pretrained(
                None,
                config=opened.settings,
                state_dict=values,
                output_loading_info=True,
                **opened.arguments,
            )
        except Exception as exc:  # Transformers may raise anything
            torch.set_rng_state(state)
            if isinstance(exc, WeightsError):
                raise
            raise refused(opened.cls, exc) from exc
        self._finish(model)
        return model, info

    def _finish(self, model: Any) -> None:
        given.finish(model, self.opened.found.root, self.asked, from_auto=self.is_auto)


def opening(
    cls: Any,
    path: Path | str,
    *,
    model_config: Any,
    role: str = "main",
    component: str | None = None,
    map_files: bool,
    timeout: float,
    host: PluginHost | None,
    arguments: Mapping[str, Any],
) -> Opening:
    """Find and check all that is needed to make an engine; arguments and errors are `open_engine`'s."""
    version = given.check_version("transformers")
    given.check_class(cls)
    given.check_arguments(arguments)
    arguments = given.with_ranks(arguments)
    device = given.one_device(arguments) or "cpu"
    ranks = ranks_of(arguments, timeout)
    size = 1 if ranks is None else ranks.topology.world.size

    def find() -> Opened:
        return _opened(cls, find_whole(Path(path), component, host, size), model_config, arguments)

    opened = find() if ranks is None else opened_together(ranks, find, str)
    return Opening(
        opened,
        w.EngineInfo(
            name="transformers",
            version=version,
            model=getattr(opened.cls, "__name__", ""),
            quantization=opened.quantization,
            device=device if ranks is None else ranks.device,
            role=role,
            component=component,
        ),
        ranks,
        map_files,
        arguments,
        given.is_auto(cls),
    )


def _opened(cls: Any, found: CheckpointFiles, model_config: Any, arguments: Mapping[str, Any]) -> Opened:
    settings, left = given.configuration(cls, found.root, model_config, arguments)
    trusted = bool(arguments.get("trust_remote_code"))
    cls, settings = given.model_class(cls, settings, found.root, trusted=trusted)
    opened = Opened(
        found=found,
        cls=cls,
        settings=settings,
        arguments=left,
        quantization=given.quantization_of(settings, left),
        block=given.block_size(settings, left),
    )
    if given.asked_dtype(left) in (None, "auto") and getattr(settings, "dtype", None) is None:
        left["dtype"] = dtype_of_weights(found, opened.metas)
    return opened


def dtype_of_weights(found: CheckpointFiles, metas: Mapping[str, w.TensorMeta]) -> torch.dtype:
    """Return the dtype that Transformers gives a model whose configuration says none.

    The index says it, else it is that of the first tensor of floating-point numbers in the first file, by
    name where the file is of safetensors. Of a state dict Transformers would take the first.
    """
    index = {} if found.index is None else json.loads(found.index.read_bytes())
    said = index["metadata"].get("dtype") if isinstance(index.get("metadata"), dict) else None
    named = getattr(torch, said, None) if isinstance(said, str) else None
    if isinstance(named, torch.dtype):
        return named
    first = [meta for meta in metas.values() if meta.file == found.files[0]]
    if found.kind == "safetensors":
        first.sort(key=lambda meta: meta.name)
    held = [dtypes.to_torch(meta.dtype) for meta in first]
    floating = [one for one in held if one.is_floating_point and one.itemsize > 1]
    return (floating or held or [torch.float32])[0]


def headers(found: CheckpointFiles) -> dict[str, w.TensorMeta]:
    """Return what a checkpoint holds, once it is validated; its files are closed again.

    Raises:
        CheckpointError: a file is malformed.
    """
    metas: dict[str, w.TensorMeta] = {}
    for shard in open_shards(found):
        metas |= shard.metas
        shard.close()
    return metas
