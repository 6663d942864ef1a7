# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint opened for reading: one `Shard` per file, whatever its kind."""

from __future__ import annotations

import abc
import contextlib
import ctypes
import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from weights_core import dtypes
from weights_core.checkpoint import CheckpointFiles, disagreements
from weights_core.errors import ArenaError, CheckpointError
from weights_core.files import File
from weights_core.header import read_header
from weights_core.mapping import FilePages, MappedFile
from weights_core.types import TensorMeta
from weights_core.weightset import Allocate, Slices, check_destination, normalise

if TYPE_CHECKING:
    import torch


class Shard(abc.ABC):
    """One weights file, validated when opened. Safe to use from several threads."""

    path: Path
    metas: Mapping[str, TensorMeta]
    allocate: Allocate | None = None
    """Where `read` gets host memory from; torch's own by default."""

    @abc.abstractmethod
    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return a tensor, or the part that `slices` selects, in host memory.

        Raises:
            CheckpointError: the bytes cannot be had; names file, tensor and byte.
        """

    @abc.abstractmethod
    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Bring a tensor, or a part of it, into `out`.

        Raises:
            ValueError: `out` has another shape or dtype than what is read.
            CheckpointError: as `read`.
        """

    def mapped(self, name: str, slices: Slices | None = None) -> torch.Tensor | None:
        """Return a tensor, or a part of it, where it lies in the file; None if it must be read instead.

        It is private, every page of it has been read, and no two tensors share a byte.

        Raises:
            CheckpointError: as `read`.
        """
        del name, slices
        return None

    @abc.abstractmethod
    def release(self, name: str) -> None:
        """Forget what is held for a tensor."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free everything; idempotent."""

    def _memory(self, count: int, offset: int = 0) -> torch.Tensor:
        import torch

        if self.allocate is None or not count:
            return torch.empty(count, dtype=torch.uint8, device="cpu")
        return self.allocate(count, offset)

    def _clone(self, part: torch.Tensor) -> torch.Tensor:
        """Clone into memory of ours, with the strides that a clone has."""
        import torch

        raw = self._memory(part.numel() * part.element_size())
        return (
            raw.view(part.dtype)
            .as_strided(part.shape, torch.empty_like(part, device="meta").stride())
            .copy_(part)
        )


class SafetensorsShard(Shard):
    """A safetensors file read by positioned reads into fresh memory; mapped only by `mapped`."""

    def __init__(self, path: Path) -> None:
        """Open and validate.

        Raises:
            CheckpointError: the file is malformed; says where.
        """
        self.path = path
        self.file = File(path)
        self._pages: FilePages | None = None
        self._given: set[str] = set()
        self._lock = threading.Lock()
        try:
            self.metas = read_header(self.file).metas
        except BaseException:
            self.file.close()
            raise

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Read the rows that `slices` covers, then cut what is left of the other dimensions."""
        meta = self.metas[name]
        dtype = self.torch_dtype(meta)
        wanted = normalise(slices, meta.torch_shape)
        rows, rest = wanted[:1], wanted[1:]
        shape = tuple(len(r) for r in rows) + meta.torch_shape[1:]
        count, skip = _row_bytes(meta, rows)
        raw = self._memory(count, aligned((meta.offset or 0) + skip, dtype))
        self._read(meta, raw, skip)
        tensor = raw.view(dtype).reshape(shape)
        for dim, r in enumerate(rest, start=1):
            tensor = tensor.narrow(dim, r.start, len(r))
        return tensor if tuple(tensor.shape) == shape else self._clone(tensor)

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Read whole rows straight into `out` if it is contiguous, to a device through pinned memory."""
        from weights_core.tensors import as_bytes, fill_through, stage_for

        meta = self.metas[name]
        dtype = self.torch_dtype(meta)
        wanted = normalise(slices, meta.torch_shape)
        check_destination(name, out, tuple(len(r) for r in wanted), dtype)
        _, skip = _row_bytes(meta, wanted[:1])
        if not out.is_contiguous() or not _whole_rows(meta, wanted):
            out.detach().copy_(self.read(name, slices))
        elif out.device.type == "cpu":
            self._read(meta, as_bytes(out), skip)
        else:
            fill_through(stage_for(out), out, lambda memory, at: self._read(meta, memory, skip + at))

    def extent(self, name: str, slices: Slices | None = None) -> range | None:
        """Return which bytes of the file a part takes; None if not one aligned piece, or none at all."""
        meta = self.metas[name]
        return self._extent(meta, normalise(slices, meta.torch_shape) if slices else None)

    def _extent(self, meta: TensorMeta, wanted: tuple[range, ...] | None) -> range | None:
        begin, count = meta.offset or 0, meta.nbytes
        if wanted is not None:
            if not _whole_rows(meta, wanted):
                return None
            count, skip = _row_bytes(meta, wanted[:1])
            begin += skip
        try:
            width = dtypes.to_torch(meta.dtype).itemsize
        except KeyError:
            return None
        return None if not count or begin % width else range(begin, begin + count)

    def mapped(self, name: str, slices: Slices | None = None) -> torch.Tensor | None:
        """Return whole rows where they lie, if their elements are aligned and the system can map them."""
        meta = self.metas[name]
        wanted = normalise(slices, meta.torch_shape) if slices else None
        extent = self._extent(meta, wanted)
        if extent is None:
            return None
        try:
            raw = self._pages_for(name).tensor(extent.start, len(extent))
        except ArenaError:
            return None  # the file system, or a limit, is against it
        except CheckpointError as exc:
            exc.tensor = name
            raise
        if raw is None:
            return None
        shape = meta.torch_shape if wanted is None else tuple(map(len, wanted))
        return raw.view(self.torch_dtype(meta)).view(shape)

    def bring(self, extent: range) -> None:
        """Have the kernel read bytes into the pages that `mapped` lends; what fails, fails there."""
        with contextlib.suppress(ArenaError, CheckpointError):
            with self._lock:
                pages = self._pages = self._pages or FilePages(self.file)
            pages.bring(extent.start, len(extent))

    def _pages_for(self, name: str) -> FilePages:
        """Return the file's pages; others if these have lent the tensor, for it may have been written to."""
        with self._lock:
            if self._pages is None or name in self._given:
                self._pages, self._given = FilePages(self.file), set()
            self._given.add(name)
            return self._pages

    def release(self, name: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Close the file; what was mapped lives on."""
        self._pages = None
        self.file.close()

    def torch_dtype(self, meta: TensorMeta) -> torch.dtype:
        """Return the dtype torch gives a tensor of this file.

        Raises:
            CheckpointError: this torch has none.
        """
        try:
            return dtypes.to_torch(meta.dtype)
        except KeyError:
            raise CheckpointError(
                f"this version of torch has no dtype for {meta.dtype}", file=self.path, tensor=meta.name
            ) from None

    def _read(self, meta: TensorMeta, out: torch.Tensor, skip: int) -> None:
        assert meta.offset is not None
        if not out.numel():
            return
        memory = (ctypes.c_char * out.numel()).from_address(out.data_ptr())
        try:
            self.file.read_into(memoryview(memory).cast("B"), meta.offset + skip)
        except CheckpointError as exc:
            exc.tensor = meta.name
            raise


def aligned(offset: int, dtype: torch.dtype) -> int:
    """Return `offset`, or 0 if elements of `dtype` at such an address would not be aligned."""
    return 0 if offset % dtype.itemsize else offset


def _whole_rows(meta: TensorMeta, wanted: tuple[range, ...]) -> bool:
    return all(len(r) == size for r, size in zip(wanted[1:], meta.torch_shape[1:], strict=True))


def _row_bytes(meta: TensorMeta, rows: tuple[range, ...]) -> tuple[int, int]:
    """Return how many bytes `rows` of the first dimension take, and how many lie before them."""
    if not rows:
        return meta.nbytes, 0
    count = meta.torch_shape[0]
    per_row = meta.nbytes // count if count else 0
    return len(rows[0]) * per_row, rows[0].start * per_row


class PickledShard(Shard):
    """A file of `torch.save`, read with `weights_only=True` and mapped where its format allows.

    What is read is copied and the file looked at before and after, so a file that is rewritten is an
    error; one that is cut short in the very moment of a copy ends the process, as with any mapping.
    """

    def __init__(self, path: Path) -> None:
        """Open and validate.

        Raises:
            CheckpointError: not such a file, or it holds anything but named tensors.
        """
        self.path = path
        self._file = File(path)
        try:
            self._tensors = _unpickle(self._file)
            self._mapped = MappedFile(path)
            self.metas = {name: _pickled_meta(path, name, t) for name, t in self._tensors.items()}
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Copy the tensor, or a part of it, out of the mapped file."""
        part = self._part(name, slices)
        copy = self._clone(part)
        self._done(part)
        return copy

    def read_into(self, name: str, out: torch.Tensor, slices: Slices | None = None) -> None:
        """Copy into `out`."""
        part = self._part(name, slices)
        check_destination(name, out, tuple(part.shape), part.dtype)
        out.detach().copy_(part)
        self._done(part)

    def _done(self, part: torch.Tensor) -> None:
        self._file.check_unchanged()
        if part.is_contiguous():
            self._mapped.drop(part.data_ptr(), part.numel() * part.element_size())

    def _part(self, name: str, slices: Slices | None) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError("was released and cannot be read again", file=self.path, tensor=name)
        self._file.check_unchanged()  # before too: touching what was cut off a mapped file is fatal
        for dim, r in enumerate(normalise(slices, tuple(tensor.shape))):
            tensor = tensor.narrow(dim, r.start, len(r))
        return tensor

    def release(self, name: str) -> None:
        """Drop the tensor; its memory goes with the last tensor on the same storage."""
        self._tensors.pop(name, None)

    def shared(self) -> list[tuple[str, ...]]:
        """Return the groups of names that stand for the same elements of one storage."""
        groups: dict[object, list[str]] = {}
        for name, tensor in self._tensors.items():
            if tensor.numel():
                place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                groups.setdefault(place, []).append(name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def close(self) -> None:
        """Drop all tensors."""
        self._file.close()
        self._tensors.clear()


def _unpickle(file: File) -> dict[str, torch.Tensor]:
    import torch

    path = file.path
    try:
        mapped = file.read(min(4, file.size), 0) == _ZIP  # older than torch 1.6 are not, nor mappable
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as exc:
        raise CheckpointError(
            "refused: it is truncated, no file of torch.save, or its pickle holds more than tensors "
            "and could run code. Convert it to safetensors where you trust it",
            file=path,
        ) from exc
    except Exception as exc:  # an untrusted parser may raise anything; all of it means "malformed"
        why = str(exc) or type(exc).__name__
        raise CheckpointError(f"is truncated, or no file of torch.save ({why})", file=path) from exc
    if not isinstance(loaded, dict):
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a dict of tensors", file=path)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"holds {name!r} → {type(value).__name__}; need names → tensors, "
                "so save the inner dict (often 'state_dict' or 'model') alone",
                file=path,
            )
    return {name: tensor.detach().resolve_conj() for name, tensor in loaded.items()}


def _pickled_meta(path: Path, name: str, tensor: torch.Tensor) -> TensorMeta:
    import torch

    try:
        dtype = dtypes.from_torch(tensor.dtype)
    except KeyError:
        raise CheckpointError(f"cannot serve dtype {tensor.dtype}", file=path, tensor=name) from None
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"cannot serve layout {tensor.layout}", file=path, tensor=name)
    if tensor.device.type != "cpu":
        raise CheckpointError(f"cannot serve device {tensor.device}", file=path, tensor=name)
    shape = dtypes.stored_shape(dtype, tuple(tensor.shape))
    return TensorMeta(name, shape, dtype, tensor.numel() * tensor.element_size(), path)


_ZIP = b"PK\x03\x04"
_OPENERS: dict[str, Callable[[Path], Shard]] = {"safetensors": SafetensorsShard, "torch": PickledShard}


def open_shards(found: CheckpointFiles, executor: Executor | None = None) -> list[Shard]:
    """Open and validate every file, and all of them together, before a tensor is read.

    With an `executor` the files are opened concurrently.

    Raises:
        CheckpointError: a file is malformed, a tensor is in two files, or files and index differ.
    """
    opener = _OPENERS[found.kind]
    with contextlib.ExitStack() as undo:

        def open_one(path: Path) -> Shard:
            shard = opener(path)
            undo.callback(shard.close)
            return shard

        if executor is None:
            opened = [open_one(file) for file in found.files]
        else:
            futures = [executor.submit(open_one, file) for file in found.files]
            wait(futures)  # all of them, so that none is opened after a failure has closed the others
            opened = [future.result() for future in futures]
        for disagreement in disagreements(found, {shard.path: shard.metas for shard in opened}):
            raise disagreement
        undo.pop_all()
    return opened
