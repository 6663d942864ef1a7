# SPDX-License-Identifier: Apache-2.0
"""Parse and validate the header of one safetensors file, before any tensor is read.

The rules are those of the safetensors format: an 8-byte little-endian length, that many bytes of
JSON, then tensor data without overlap, gap or trailing bytes. Errors name file, tensor and byte.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import attrs

from weights_core import dtypes
from weights_core.errors import CheckpointError
from weights_core.files import File
from weights_core.types import TensorMeta

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@attrs.frozen
class Header:
    """The tensors of a safetensors file by name, in storage order, and its free-form metadata."""

    metas: Mapping[str, TensorMeta]
    metadata: Mapping[str, str]


_NOT_WEIGHTS = {
    b"version ": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<!": "a web page, not weights: the download was answered by a page",
    b"<html": "a web page, not weights: the download was answered by a page",
    b"GGUF": "a GGUF file, which is another format: convert it to safetensors",
}


def read_header(file: File) -> Header:
    """Read and validate the header of an open safetensors file.

    Raises:
        CheckpointError: the file is not a valid safetensors file; says where and why.
    """
    path = file.path
    if file.size < 8:
        raise CheckpointError(f"{file.size} bytes is too short for a safetensors file", file=path)
    start = file.read(8, 0)
    for beginning, what in _NOT_WEIGHTS.items():
        if start.startswith(beginning):
            raise CheckpointError(f"is {what}", file=path)
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise CheckpointError(f"header of {length} bytes, the limit is {MAX_HEADER}", file=path, offset=0)
    if 8 + length > file.size:
        raise CheckpointError(
            f"header of {length} bytes, but the file has only {file.size}: truncated or not safetensors",
            file=path,
            offset=0,
        )
    entries = _parse(path, file.read(length, 8))
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_text_by_name(metadata):
        raise CheckpointError("the header's __metadata__ is not an object of strings", file=path, offset=8)
    start = 8 + length
    metas = sorted((_meta(path, name, entry, start) for name, entry in entries.items()), key=_position)
    _check_extents(path, metas, start, file.size)
    return Header({meta.name: meta for meta in metas}, metadata or {})


def _is_text_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _position(meta: TensorMeta) -> tuple[int, int]:
    assert meta.offset is not None
    return meta.offset, meta.nbytes


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise CheckpointError("the header names it twice", file=path, tensor=twice)
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"the header is not valid JSON: {exc}", file=path, offset=8) from exc
    if not isinstance(parsed, dict):
        raise CheckpointError("the header is not a JSON object", file=path, offset=8)
    return parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _meta(path: Path, name: str, entry: Any, start: int) -> TensorMeta:
    def fail(why: str) -> NoReturn:
        raise CheckpointError(why, file=path, tensor=name)

    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        fail("its name is not valid Unicode")
    if not isinstance(entry, dict):
        fail("its header entry is not an object")
    dtype, shape = entry.get("dtype"), _sizes(entry.get("shape"))
    offsets = _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        fail(f"unknown dtype {dtype!r}; known are {', '.join(dtypes.BITS)}")
    if shape is None:
        fail(f"its shape {entry.get('shape')!r} is not a list of sizes")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(f"its data_offsets {entry.get('data_offsets')!r} are not [begin, end]")
    try:
        nbytes = dtypes.nbytes(dtype, shape)
    except ValueError as exc:
        fail(str(exc))
    begin, end = offsets
    if end - begin != nbytes:
        fail(f"{dtype} {list(shape)} takes {nbytes} bytes, its data_offsets span {end - begin}")
    return TensorMeta(name, shape, dtype, nbytes, path, start + begin)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    for size in value:
        if type(size) is not int or not 0 <= size < 2**63:
            return None
    return tuple(value)


def _check_extents(path: Path, metas: list[TensorMeta], start: int, size: int) -> None:
    end = start
    for meta in metas:
        begin, _ = _position(meta)
        if begin < end:
            raise CheckpointError(
                f"overlaps the tensor before it, which ends at {end}",
                file=path,
                tensor=meta.name,
                offset=begin,
            )
        if begin > end:
            raise CheckpointError(
                f"{begin - end} bytes before it belong to no tensor",
                file=path,
                tensor=meta.name,
                offset=begin,
            )
        end = begin + meta.nbytes
        if end > size:
            raise CheckpointError(
                f"ends at byte {end}, the file has {size}: truncated",
                file=path,
                tensor=meta.name,
                offset=begin,
            )
    if end != size:
        raise CheckpointError(f"{size - end} bytes after the last tensor", file=path, offset=end)
