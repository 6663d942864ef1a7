# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with checkpoints: damage one on purpose, and see that it is an error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any


def cut_short(checkpoint: Path) -> Path:
    """Cut the largest file in half, as a download that was broken off; return it."""
    file = _largest(checkpoint)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    return file


def removed(checkpoint: Path) -> Path:
    """Remove the largest file; return where it was."""
    file = _largest(checkpoint)
    file.unlink()
    return file


def garbage(checkpoint: Path) -> Path:
    """Overwrite the beginning of the largest file, where its header is; return it."""
    file = _largest(checkpoint)
    with file.open("r+b") as handle:
        handle.write(b"\xff" * 64)
    return file


def longer(checkpoint: Path) -> Path:
    """Append bytes that belong to no tensor to the largest safetensors file; return it."""
    file = _largest(checkpoint)
    with file.open("ab") as handle:
        handle.write(b"\0" * 64)
    return file


def unknown_dtype(checkpoint: Path) -> Path:
    """Give a tensor of the largest safetensors file a dtype that does not exist; return the file."""

    def change(header: dict[str, Any]) -> None:
        _first(header)["dtype"] = "F12"

    return _rewritten(_largest(checkpoint), change)


def overlapping(checkpoint: Path) -> Path:
    """Have the second tensor of a safetensors file begin inside the first; return the file."""

    def change(header: dict[str, Any]) -> None:
        second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[1]
        begin, end = second["data_offsets"]
        second["data_offsets"] = [begin - 1, end - 1]

    return _rewritten(_largest(checkpoint), change)


def nowhere_but_in_the_index(checkpoint: Path) -> Path:
    """Have the index promise a tensor that no file holds; return the index."""
    index = next(checkpoint.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["promised.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    return index


FAULTS: Mapping[str, Callable[[Path], Path]] = MappingProxyType(
    {
        fault.__name__: fault
        for fault in (
            cut_short,
            removed,
            garbage,
            longer,
            unknown_dtype,
            overlapping,
            nowhere_but_in_the_index,
        )
    }
)
"""By name, every way to damage a safetensors checkpoint of several files; each returns the file at fault."""


def _largest(checkpoint: Path) -> Path:
    files = [checkpoint] if checkpoint.is_file() else [p for p in checkpoint.rglob("*") if p.is_file()]
    tensors = [p for p in files if p.suffix != ".json"]  # an index may be larger than what it lists
    return max(tensors, key=lambda p: p.stat().st_size)


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for name, value in header.items() if name != "__metadata__")
    return entry


def _rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the header of a safetensors file, and keep its data where it is counted from."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return file
