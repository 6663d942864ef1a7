# SPDX-License-Identifier: Apache-2.0
"""Broken owners. All keep one copy per content for the engines of a process, and do one thing wrong."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from weights_core.hookspecs import hookimpl
from weights_core.plugin import ProviderPlugin
from weights_core.types import FormatClaim, Layout, LoadRequest, Outcome, Role, TensorMeta
from weights_core.weightset import Slices, WeightSet

if TYPE_CHECKING:
    import torch

    from weights_core.engine import Engine
    from weights_core.source import Source


@attrs.define(eq=False)
class Copy:
    """One copy of some weights, and how many engines hold it."""

    metas: Mapping[str, TensorMeta]
    tensors: dict[str, torch.Tensor]
    holders: int = 0


class SoundOwner(ProviderPlugin[None]):
    """Reads what is below, and hands every engine the same tensors for the same bytes."""

    shelf: ClassVar[dict[Hashable, Copy]] = {}
    lock: ClassVar[threading.Lock] = threading.Lock()

    @hookimpl
    def resolve_format(self, request: LoadRequest) -> FormatClaim:
        return FormatClaim(roles={Role.OWNER}, reason="one copy for all", layouts={Layout.SHARDED})

    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        below = source.open()
        read = Copy(dict(below.metas), {name: tensor.clone() for name, tensor in below.stream()})
        below.close()
        key = (type(self).__name__, self.content(request, read))
        with self.lock:
            copy = self.shelf.setdefault(key, read)
            copy.holders += 1
        self.held = OnShelf(self, key, copy)
        return self.held

    def content(self, request: LoadRequest, copy: Copy) -> Hashable:
        """Return what must be equal for weights to be the same: names, shapes, dtypes and bytes."""
        from weights_core.tensors import as_bytes

        return request.checkpoint, tuple(
            (name, meta.dtype, meta.shape, as_bytes(copy.tensors[name]).numpy().tobytes())
            for name, meta in copy.metas.items()
        )

    def leave(self, key: Hashable, copy: Copy) -> None:
        """Forget a copy with its last holder."""
        with self.lock:
            copy.holders -= 1
            if not copy.holders:
                self.shelf.pop(key, None)


class OnShelf(WeightSet):
    """The tensors of a copy; closing it gives up this engine's hold."""

    provider = "shelf"
    layout = Layout.SHARDED

    def __init__(self, owner: SoundOwner, key: Hashable, copy: Copy) -> None:
        self.copy = copy
        self._owner = owner
        self._key = key
        self._closed = False

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        return self.copy.metas

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        return self.copy.tensors[name][slices or ...]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner.leave(self._key, self.copy)


SOUND = SoundOwner


class KnowsShapesOnly(SoundOwner):
    def content(self, request: LoadRequest, copy: Copy) -> Hashable:
        return tuple((name, meta.dtype, meta.shape) for name, meta in copy.metas.items())


class AttachesToNothing(SoundOwner):
    @hookimpl
    def load_weights(self, request: LoadRequest, engine: Engine, source: Source) -> WeightSet:
        weights = super().load_weights(request, engine, source)
        assert isinstance(weights, OnShelf)
        if weights.copy.holders > 1:
            blank = {name: tensor.clone().fill_(0) for name, tensor in weights.copy.tensors.items()}
            weights.copy = Copy(weights.copy.metas, blank, holders=1)
        return weights


class FreesForAll(SoundOwner):
    def leave(self, key: Hashable, copy: Copy) -> None:
        super().leave(key, copy)
        for tensor in copy.tensors.values() if copy.holders else ():
            tensor.fill_(0)


class KeepsWhatFailed(SoundOwner):
    @hookimpl
    def cleanup(self, outcome: Outcome) -> None:
        if outcome.status == "failed" and hasattr(self, "held"):
            self.held.copy.holders += 1
            for tensor in self.held.copy.tensors.values():
                tensor.fill_(0)


BROKEN: Mapping[str, type] = {
    "another_content_is_never_served": KnowsShapesOnly,
    "a_second_engine_gets_the_same": AttachesToNothing,
    "one_engine_does_not_free_anothers_weights": FreesForAll,
    "an_incomplete_load_is_never_shared": KeepsWhatFailed,
}
"""Clause → the owner that breaks it."""
