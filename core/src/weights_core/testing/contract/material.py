# SPDX-License-Identifier: Apache-2.0
"""What clauses load: small checkpoints, ways to damage them, and plugins that get in the way."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from weights_core.errors import PublishError
from weights_core.hookspecs import API_VERSION, hookimpl
from weights_core.tensors import meta_of
from weights_core.testing.checkpoints import random_tensor
from weights_core.types import FormatClaim, Layout, LoadRequest, Role, TensorMeta
from weights_core.weightset import Slices, Target, WeightSet


def few(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return two small tensors of random bits."""
    return {
        "a": random_tensor(3, 4, dtype="F32", seed=seed + 1),
        "b": random_tensor(5, dtype="U8", seed=seed + 2),
    }


def many(seed: int = 0, *, prefix: str = "many.") -> dict[str, torch.Tensor]:
    """Return 24 tensors of 64 KiB each, of random bits."""
    return {f"{prefix}{i}.w": random_tensor(64, 256, dtype="F32", seed=seed + i) for i in range(24)}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of every file."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


class Spy(WeightSet):
    """A set over tensors in memory that remembers what it was asked.

    Hands out views of one buffer, as an owner of shared pages does, and frees nothing on `release`.
    """

    provider = "spy"
    layout = Layout.SHARDED

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        self.released: list[str] = []
        self.closed = 0
        self.streams = 0
        """How many streams are running."""
        self.error: Exception | None = None
        """What reading raises, if anything."""
        self._metas = {name: meta_of(name, tensor) for name, tensor in tensors.items()}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        return self._metas

    @property
    def bytes_read(self) -> int:
        return 12345

    @property
    def notes(self) -> tuple[str, ...]:
        return ("a note of the spy",)

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return self.tensors[name][slices or ...]

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        self.streams += 1
        try:
            yield from super().stream(names)
        finally:
            self.streams -= 1

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        self.streams += 1
        try:
            yield from super().fill(targets)
        finally:
            self.streams -= 1

    def release(self, names: Iterable[str]) -> int:
        self.released += names
        return 0

    def close(self) -> None:
        self.closed += 1


def source_of(weights: WeightSet | Exception) -> type:
    """Return the class of a source that provides a set, or raises."""

    class Source:
        weights_api = API_VERSION

        @hookimpl
        def resolve_format(self, request: LoadRequest) -> FormatClaim:
            return FormatClaim(roles={Role.SOURCE}, reason="for a test", layouts=frozenset(Layout))

        @hookimpl
        def load_weights(self) -> WeightSet:
            if isinstance(weights, Exception):
                raise weights
            return weights

    return Source


def saboteur(hook: str) -> type:
    """Return the class of a plugin that takes part and fails in `before_post_load` or `publish`."""

    class Saboteur:
        weights_api = API_VERSION

        @hookimpl
        def resolve_format(self, request: LoadRequest) -> FormatClaim:
            return FormatClaim(
                roles={Role.PUBLISHER}, reason="to fail", publish_at=Layout.SHARDED, required=True
            )

        @hookimpl
        def before_post_load(self) -> None:
            if hook == "before_post_load":
                raise PublishError("sabotage")

        @hookimpl
        def publish(self) -> None:
            if hook == "publish":
                raise PublishError("sabotage")

    return Saboteur
