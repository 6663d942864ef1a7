# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: reads every byte of a checkpoint and keeps none. For the CLI."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from weights_core import coverage
from weights_core.engine import Engine
from weights_core.errors import CoverageError
from weights_core.parts import stored_names, taking_anything
from weights_core.tensors import as_bytes
from weights_core.types import Applied, EngineInfo, Layout, TensorMeta
from weights_core.weightset import WeightSet


class ScanEngine(Engine):
    """Copies each tensor into one scratch buffer, so that a lazily mapped file cannot cheat.

    With `verify`, every tensor is also compared with a read of its file by the safetensors
    library, or by torch, which share no code with this project's reader.
    """

    def __init__(
        self,
        component: str | None = None,
        *,
        part: EngineInfo | None = None,
        verify: bool = False,
        files: Iterable[Path] = (),
    ) -> None:
        """Describe what to read.

        Args:
            component: the folder of a pipeline.
            part: the engine that a part of a checkpoint was cut for.
            verify: compare with an independent read, and miss what only that read finds.
            files: the files that must be covered, besides those that the weights name.
        """
        self._info = EngineInfo(name="scan", version="1", component=component)
        if part is not None:
            self._info = taking_anything(part)
        self._verify = verify
        self._files = frozenset(files)
        self._seen: dict[str, TensorMeta] = {}
        self.verified = 0
        """Bytes compared."""

    @property
    def info(self) -> EngineInfo:
        """An engine that takes a checkpoint as it is, or what was cut for another, and shares nothing."""
        return self._info

    def expected(self, layout: Layout) -> Mapping[str, TensorMeta]:
        """Return what the set held."""
        del layout
        return self._seen

    def untouched(self) -> bool:
        """There is nothing to touch."""
        return True

    def apply(self, weights: WeightSet) -> Applied:
        """Read, copy and, if asked, compare every tensor.

        Raises:
            CoverageError: a tensor differs from the independent read; names it and its file.
        """
        self._seen = dict(weights.metas)
        largest = max((meta.nbytes for meta in self._seen.values()), default=0)
        scratch = torch.empty(largest, dtype=torch.uint8, device="cpu")
        independent = _Independent()
        stored = stored_names(self._seen.values())
        self.verified = 0
        written = set()
        for name, tensor in weights.stream():
            raw = as_bytes(tensor)
            scratch[: raw.numel()].copy_(raw)
            if self._verify:
                _compare(weights.meta(name), tensor, independent, stored.get(name, name))
                self.verified += raw.numel()
            written.add(name)
            weights.release([name])
        if self._verify:
            _check_names(independent, self._files | {m.file for m in self._seen.values() if m.file}, written)
        return Applied(written=written, unused=())

    def bind(self, weights: WeightSet) -> Applied:
        """Read what was cut as `apply` reads what is whole."""
        return self.apply(weights)

    def gather(self, value: object, timeout: float) -> Sequence[object]:
        """Answer for the ranks that are not here."""
        del timeout
        return [value] * self._info.topology.world.size


class _Independent:
    """The files as the safetensors library, or torch, reads them."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def names(self, file: Path) -> frozenset[str]:
        return frozenset(self._open(file).keys())

    def read(self, file: Path, name: str) -> torch.Tensor:
        opened = self._open(file)
        tensor: torch.Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            if file.suffix == ".safetensors":
                self._files[file] = safe_open(file, framework="pt")
            else:
                mapped = zipfile.is_zipfile(file)
                self._files[file] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        return self._files[file]


def _check_names(independent: _Independent, files: Iterable[Path], written: set[str]) -> None:
    for file in sorted(files):
        missing = sorted(independent.names(file) - written)
        if missing:
            raise CoverageError(
                f"{file} holds what the weights did not: {coverage.listed(missing)}", missing=missing
            )


def _compare(meta: TensorMeta, tensor: torch.Tensor, independent: _Independent, stored: str) -> None:
    if meta.file is None:
        raise CoverageError(f"tensor {meta.name!r} lies in no file, so there is nothing to verify it against")
    other = independent.read(meta.file, stored)
    same = other.shape == tensor.shape and other.dtype == tensor.dtype
    if not same or not torch.equal(as_bytes(other), as_bytes(tensor)):
        raise CoverageError(
            f"{meta.file}: tensor {meta.name!r} is not what an independent read of the file gives",
            mismatched={meta.name: "differs from the independent read"},
        )
