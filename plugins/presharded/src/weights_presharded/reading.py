# SPDX-License-Identifier: Apache-2.0
"""A rank's files as a set that an engine takes as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import xxhash

from weights_core import Layout, Target, TensorMeta
from weights_core.checkpoint import CheckpointFiles
from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError
from weights_core.shards import SafetensorsShard, aligned, open_shards
from weights_core.weightset import Allocate, Slices, WeightSet, WeightSetWrapper, check_destination, normalise
from weights_presharded.cutting import FileBytes, view_of
from weights_presharded.manifest import MANIFEST, RankManifest

if TYPE_CHECKING:
    import torch

_BLOCK = 512 << 10
"""Bytes that are read and hashed at a time: they are in the processor's cache in between."""


class RankSet(WeightSetWrapper):
    """One rank's tensors, by the engine's names; tied names stand for what is stored once.

    Every tensor is read whole into memory of the engine's own. With `digests` it is hashed as it is read,
    once, and handed out only if it is what was written.
    """

    fills = True

    def __init__(
        self,
        inner: ShardSet,
        *,
        layout: Layout,
        ties: Mapping[str, str] | None = None,
        digests: Mapping[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(inner)
        self._files = inner
        self._allocate: Allocate | None = None
        self.fills = True
        self.layout = layout
        self.provider = "presharded"
        self._ties = dict(ties or {})
        self._digests = digests
        self._verified: set[str] = set()
        self._extra = notes
        twins: dict[str, list[str]] = {}
        for tie, stored in self._ties.items():
            twins.setdefault(stored, []).append(tie)
        metas: dict[str, TensorMeta] = {}
        for name, meta in inner.metas.items():
            metas |= {one: attrs.evolve(meta, name=one) for one in (name, *twins.get(name, ()))}
        self._metas = MappingProxyType(metas)
        self._position = {name: index for index, name in enumerate(metas)}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """By file, then by offset; tied names after the one that is stored."""
        return self._metas

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the files, and whether they are verified."""
        return (*self.inner.notes, *self._extra)

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read a tensor, or a part of it: what is to be verified is read whole."""
        stored = self._stored(name)
        if self._is_trusted(stored):
            return self.inner.read(stored, slices)
        tensor = self._made(stored)
        self._read_verified(stored, tensor)
        if not slices:
            return tensor
        for dim, chosen in enumerate(normalise(slices, tuple(tensor.shape))):
            tensor = tensor.narrow(dim, chosen.start, len(chosen))
        return tensor.clone()

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out`: straight, if it is contiguous host memory; else by way of host memory."""
        stored = self._stored(name)
        if self._is_trusted(stored):
            self.inner.read_into(stored, out, slices)
        elif not slices and out.device.type == "cpu" and out.is_contiguous():
            self._read_verified(stored, out)
        else:
            tensor = self.read(stored, slices)
            check_destination(name, out, tuple(tensor.shape), tensor.dtype)
            out.detach().copy_(tensor)

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read by file and offset."""
        order = list(self._metas) if names is None else sorted(set(names), key=self._position.__getitem__)
        for name in order:
            yield name, self.read(name)

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill by file and offset."""
        return WeightSet.fill(self, sorted(targets, key=lambda target: self._position[target.name]))

    def release(self, names: Iterable[str]) -> int:
        """Release what is held for the tensors; nothing is."""
        return self.inner.release([self._stored(name) for name in names])

    def allocate_from(self, allocate: Allocate) -> None:
        """Make what is read from now on in what `allocate` returns."""
        self._allocate = allocate
        self.inner.allocate_from(allocate)

    def _stored(self, name: str) -> str:
        return self._ties.get(name, name)

    def _is_trusted(self, stored: str) -> bool:
        return self._digests is None or stored in self._verified

    def _shard_of(self, stored: str) -> SafetensorsShard:
        shard = self._files.shard_of(stored)
        assert isinstance(shard, SafetensorsShard)
        return shard

    def _made(self, stored: str) -> torch.Tensor:
        from weights_core.tensors import allocate

        meta = self._metas[stored]
        dtype = self._shard_of(stored).torch_dtype(meta)
        make = self._allocate if self._allocate is not None and meta.nbytes else allocate
        raw = make(meta.nbytes, aligned(meta.offset or 0, dtype))
        return raw.view(dtype).reshape(meta.torch_shape)

    def _read_verified(self, stored: str, out: torch.Tensor) -> None:
        """Read a tensor into contiguous host memory, each block hashed while the cache still has it."""
        from weights_core.tensors import as_bytes

        assert self._digests is not None
        meta, shard = self._metas[stored], self._shard_of(stored)
        check_destination(stored, out, meta.torch_shape, shard.torch_dtype(meta))
        view, source, hasher = view_of(as_bytes(out)), FileBytes(shard, meta), xxhash.xxh3_128()
        for at in range(0, meta.nbytes, _BLOCK):
            block = view[at : at + _BLOCK]
            source.read_into(block, at)
            hasher.update(block)
        self._files.count(meta.nbytes)
        found = f"xxh3_128:{hasher.hexdigest()}"
        if found != self._digests[stored]:
            raise CheckpointError(
                f"its bytes are not those that were written: digest {found}, "
                f"{MANIFEST} says {self._digests[stored]}",
                file=meta.file,
                tensor=stored,
            )
        self._verified.add(stored)


def open_rank(folder: Path, manifest: RankManifest, *, layout: Layout, verify: bool) -> RankSet:
    """Open a rank's files and compare their headers with its manifest.

    Raises:
        CheckpointError: a file is missing, cut short, or is not the one that was written; names it, and
            the tensor where there is one.
    """
    files = tuple(folder / name for name in manifest.files)
    for file in files:
        _check_size(file, manifest.files[file.name])
    shards = open_shards(CheckpointFiles(root=folder, kind="safetensors", files=files))
    inner = ShardSet(shards, provider="presharded")
    try:
        _compare(folder, manifest, inner.metas)
    except BaseException:
        inner.close()
        raise
    how = "is verified as it is read" if verify else "is not verified (verify = false)"
    return RankSet(
        inner,
        layout=layout,
        ties=manifest.ties,
        digests=manifest.digests if verify else None,
        notes=(f"presharded: {folder}; every tensor {how}",),
    )


def _check_size(file: Path, due: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as exc:
        raise CheckpointError(f"{MANIFEST} names this file: {exc.strerror}", file=file) from exc
    if size != due:
        what = "truncated" if size < due else "not the file that was written"
        raise CheckpointError(f"has {size:,} bytes, {MANIFEST} says {due:,}: {what}", file=file)


def _compare(folder: Path, manifest: RankManifest, metas: Mapping[str, TensorMeta]) -> None:
    for name, due in manifest.tensors.items():
        found = metas.get(name)
        if found is None:
            raise CheckpointError(f"{MANIFEST} names it, and it is not there", file=due.file, tensor=name)
        if (found.shape, found.dtype, found.file) != (due.shape, due.dtype, due.file):
            raise CheckpointError(
                f"is {found.dtype} {list(found.shape)} in {found.file and found.file.name}, {MANIFEST} says "
                f"{due.dtype} {list(due.shape)} in {due.file and due.file.name}",
                file=folder,
                tensor=name,
            )
    for name in metas:
        if name not in manifest.tensors:
            raise CheckpointError(f"{MANIFEST} does not name it", file=metas[name].file, tensor=name)
