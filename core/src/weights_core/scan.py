# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: reads every byte of a checkpoint and keeps none. For the CLI."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from weights_core.engine import Engine
from weights_core.errors import CoverageError
from weights_core.tensors import as_bytes
from weights_core.types import Applied, EngineInfo, Layout, TensorMeta
from weights_core.weightset import WeightSet


class ScanEngine(Engine):
    """Copies each tensor into one scratch buffer, so that a lazily mapped file cannot cheat.

    With `verify`, every tensor is also compared with a read of its file by the safetensors
    library, or by torch, which share no code with this project's reader.
    """

    def __init__(self, component: str | None = None, *, verify: bool = False) -> None:
        self._info = EngineInfo(name="scan", version="1", component=component)
        self._verify = verify
        self._seen: dict[str, TensorMeta] = {}
        self.verified = 0
        """Bytes compared."""

    @property
    def info(self) -> EngineInfo:
        """An engine that takes a checkpoint as it is and shares nothing."""
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
        scratch = torch.empty(max((m.nbytes for m in self._seen.values()), default=0), dtype=torch.uint8)
        independent = _Independent()
        written = set()
        for name, tensor in weights.stream():
            raw = as_bytes(tensor)
            scratch[: raw.numel()].copy_(raw)
            if self._verify:
                _compare(weights.meta(name), tensor, independent)
                self.verified += raw.numel()
            written.add(name)
            weights.release([name])
        return Applied(written=written)


class _Independent:
    def __init__(self) -> None:
        self._files: dict[Path, Callable[[str], torch.Tensor]] = {}

    def read(self, file: Path, name: str) -> torch.Tensor:
        if file not in self._files:
            self._files[file] = _reader(file)
        return self._files[file](name)


def _reader(file: Path) -> Callable[[str], torch.Tensor]:
    if file.suffix == ".safetensors":
        get: Callable[[str], torch.Tensor] = safe_open(file, framework="pt").get_tensor
        return get
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return lambda name: tensors[name]


def _compare(meta: TensorMeta, tensor: torch.Tensor, independent: _Independent) -> None:
    if meta.file is None:
        raise CoverageError(f"tensor {meta.name!r} lies in no file, so there is nothing to verify it against")
    other = independent.read(meta.file, meta.name)
    same = other.shape == tensor.shape and other.dtype == tensor.dtype
    if not same or not torch.equal(as_bytes(other), as_bytes(tensor)):
        raise CoverageError(
            f"{meta.file}: tensor {meta.name!r} is not what an independent read of the file gives",
            mismatched={meta.name: "differs from the independent read"},
        )
