# SPDX-License-Identifier: Apache-2.0
"""A rank's files as a set that an engine takes as it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs

from weights_core import Layout, Target, TensorMeta
from weights_core.checkpoint import CheckpointFiles
from weights_core.disk import ShardSet
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_core.weightset import Slices, WeightSetWrapper, normalise
from weights_presharded.manifest import MANIFEST, RankManifest, digest_of

if TYPE_CHECKING:
    import torch

_AHEAD = 2
"""Tensors that may be waiting to be verified while the next is read."""


class RankSet(WeightSetWrapper):
    """One rank's tensors, by the engine's names; tied names stand for what is stored once.

    Every tensor is read whole into memory of the engine's own. With `digests` it is hashed there before
    it is handed out, and each only once.
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
        """Read a tensor, or a part of it."""
        stored = self._stored(name)
        if self._is_trusted(stored):
            return self.inner.read(stored, slices)
        tensor = self.inner.read(stored)
        self._verify(stored, tensor)
        if not slices:
            return tensor
        for dim, chosen in enumerate(normalise(slices, tuple(tensor.shape))):
            tensor = tensor.narrow(dim, chosen.start, len(chosen))
        return tensor.clone()

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read into `out`."""
        self._read_into(self._stored(name), out, slices)
        self._settle(self._stored(name), out)

    def stream(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read by file and offset."""
        order = list(self._metas) if names is None else sorted(set(names), key=self._position.__getitem__)
        for name in order:
            yield name, self.read(name)

    def fill(self, targets: Iterable[Target]) -> Iterator[Target]:
        """Fill by file and offset; each tensor is hashed while the next is read."""
        order = sorted(targets, key=lambda target: self._position[target.name])
        return self._fill(order)

    def release(self, names: Iterable[str]) -> int:
        """Release what is held for the tensors; nothing is."""
        return self.inner.release([self._stored(name) for name in names])

    def _fill(self, targets: list[Target]) -> Iterator[Target]:
        if self._digests is None:
            for target in targets:
                self._read_into(self._stored(target.name), target.out, target.slices)
                yield target
            return
        waiting: deque[tuple[Target, Future[None]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="weights-verify") as pool:
            for target in targets:
                stored = self._stored(target.name)
                self._read_into(stored, target.out, target.slices)
                waiting.append((target, pool.submit(self._settle, stored, target.out)))
                if len(waiting) > _AHEAD:
                    first, verified = waiting.popleft()
                    verified.result()
                    yield first
            while waiting:
                first, verified = waiting.popleft()
                verified.result()
                yield first

    def _stored(self, name: str) -> str:
        return self._ties.get(name, name)

    def _is_trusted(self, stored: str) -> bool:
        return self._digests is None or stored in self._verified

    def _read_into(self, stored: str, out: torch.Tensor, slices: Slices | None) -> None:
        """Read into `out` what may have to be verified there; what cannot be is verified before."""
        hashable = not slices and out.device.type == "cpu" and out.is_contiguous()
        if self._is_trusted(stored) or hashable:
            self.inner.read_into(stored, out, slices)
        else:
            from weights_core.weightset import check_destination

            tensor = self.read(stored, slices)
            check_destination(stored, out, tuple(tensor.shape), tensor.dtype)
            out.detach().copy_(tensor)

    def _settle(self, stored: str, out: torch.Tensor) -> None:
        if not self._is_trusted(stored):
            self._verify(stored, out)

    def _verify(self, stored: str, tensor: torch.Tensor) -> None:
        from weights_core.tensors import as_bytes
        from weights_presharded.cutting import view_of

        assert self._digests is not None
        raw = as_bytes(tensor)
        found = digest_of(view_of(raw))
        if found != self._digests[stored]:
            raise CheckpointError(
                f"its bytes are not those that were written: digest {found}, "
                f"{MANIFEST} says {self._digests[stored]}",
                file=self._metas[stored].file,
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
