# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, and everything that is wrong with it, without reading a tensor."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from weights_core.checkpoint import CheckpointFiles, disagreements, find
from weights_core.errors import CheckpointError
from weights_core.files import File
from weights_core.header import read_header
from weights_core.types import Layout, Part, TensorMeta

_INDEXED = re.compile(r"(?P<stem>.*?\.|)(?P<number>[0-9]+)(?:\.|$)")
_LAST_NUMBER = re.compile(r"[0-9]+$")
_SHOWN_FAULTS = 20


@attrs.frozen
class Layer:
    """The tensors of one layer, e.g. `model.layers.3`, by the rest of their names."""

    name: str
    tensors: Mapping[str, TensorMeta]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the layer."""
        return sum(meta.nbytes for meta in self.tensors.values())

    @property
    def dtypes(self) -> str:
        """The dtypes, the commonest first."""
        return " ".join(d for d, _ in Counter(m.dtype for m in self.tensors.values()).most_common())

    @property
    def form(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """What makes two layers alike: names within the layer, dtypes and shapes."""
        return tuple(sorted((name, m.dtype, m.shape) for name, m in self.tensors.items()))


@attrs.frozen(kw_only=True)
class Inspection:
    """What was found. `ties` groups names that stand for the same bytes, each with how it is known.

    Of a checkpoint that was cut, `part` is one part; its tensors are an engine's, in its `layout`.
    """

    root: Path
    kind: str
    index: Path | None
    files: Mapping[Path, Sequence[TensorMeta]]
    ties: tuple[tuple[tuple[str, ...], str], ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    part: Part | None = None
    layout: Layout = Layout.CHECKPOINT

    @property
    def metas(self) -> Iterator[TensorMeta]:
        """Every tensor, by file and offset."""
        return itertools.chain.from_iterable(self.files.values())

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(meta.nbytes for meta in self.metas)

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return sum(len(metas) for metas in self.files.values())

    @property
    def dtypes(self) -> dict[str, tuple[int, int]]:
        """Dtype → how many tensors have it, and their bytes; the most bytes first."""
        totals: dict[str, tuple[int, int]] = {}
        for meta in self.metas:
            count, size = totals.get(meta.dtype, (0, 0))
            totals[meta.dtype] = count + 1, size + meta.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in their natural order: `layers.9` before `layers.10`."""
        grouped: dict[str, dict[str, TensorMeta]] = {}
        for meta in self.metas:
            layer, rest = _split(meta.name)
            grouped.setdefault(layer, {})[rest] = meta
        return tuple(Layer(name, grouped[name]) for name in sorted(grouped, key=_natural))

    @property
    def headline(self) -> str:
        """The checkpoint in one line."""
        index = f", index {self.index.name}" if self.index else ""
        files = f"{len(self.files)} {self.kind} file{'s' * (len(self.files) != 1)}"
        tensors = f"{self.count:,} tensor{'s' * (self.count != 1)}"
        part = f", {self.part.name}" if self.part and self.part.name else ""
        layout = "" if self.layout is Layout.CHECKPOINT else f"{self.layout.value}, "
        return f"{self.root}{part}: {layout}{tensors}, {_mb(self.nbytes)} MB, {files}{index}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for its notes and faults."""
        return (*(f"note: {note}" for note in self.notes), *(f"fault: {fault}" for fault in self.faults))

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON; schema `weights.inspection/1`, described in docs/operators.md."""
        return {
            "schema": "weights.inspection/1",
            "root": str(self.root),
            "kind": self.kind,
            "layout": self.layout.value,
            "rank": self.part.rank if self.part else 0,
            "axes": {n: [a.size, a.rank] for n, a in self.part.engine.topology.axes.items()}
            if self.part
            else {},
            "index": str(self.index) if self.index else None,
            "tensor_count": self.count,
            "bytes": self.nbytes,
            "files": [
                {"name": p.name, "tensors": len(metas), "bytes": sum(m.nbytes for m in metas)}
                for p, metas in self.files.items()
            ],
            "dtypes": {d: {"tensors": n, "bytes": size} for d, (n, size) in self.dtypes.items()},
            "ties": [{"names": list(names), "known_from": how} for names, how in self.ties],
            "faults": list(self.faults),
            "notes": list(self.notes),
            "tensors": [
                {
                    "name": m.name,
                    "dtype": m.dtype,
                    "shape": list(m.shape),
                    "bytes": m.nbytes,
                    "file": m.file.name if m.file else None,
                }
                for m in self.metas
            ],
        }

    def __str__(self) -> str:
        """Return the inspection as tables for people."""
        lines = [self.headline, ""]
        lines += _table(
            ("file", "tensors", "MB"),
            [(p.name, f"{len(m):,}", _mb(sum(t.nbytes for t in m))) for p, m in self.files.items()],
        )
        lines += _table(
            ("dtype", "tensors", "MB"), [(d, f"{n:,}", _mb(size)) for d, (n, size) in self.dtypes.items()]
        )
        lines += _table(("layer", "tensors", "MB", "dtypes"), list(_layer_rows(self.layers)))
        lines += [f"tied ({how}): {' = '.join(names)}" for names, how in self.ties]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"fault: {fault}" for fault in self.faults[:_SHOWN_FAULTS]]
        if len(self.faults) > _SHOWN_FAULTS:
            lines.append(f"fault: … and {len(self.faults) - _SHOWN_FAULTS} more")
        if not self.faults:
            lines.append("no faults")
        return "\n".join(lines)


def inspect(path: Path, component: str | None = None) -> Inspection:
    """Read the headers of every file of a checkpoint, and collect what is wrong with them.

    Raises:
        CheckpointError: there is no checkpoint, or not even its list of files can be told.
    """
    found = find(path, component)
    files: dict[Path, Sequence[TensorMeta]] = {}
    faults: list[str] = []
    ties: list[tuple[tuple[str, ...], str]] = []
    for file in found.files:
        try:
            metas, tied = _read(found, file)
        except CheckpointError as exc:
            faults.append(str(exc))
            continue
        files[file] = metas
        ties += tied
    held = {file: [meta.name for meta in metas] for file, metas in files.items()}
    faults += map(str, disagreements(found, held))
    known = {name for names, _ in ties for name in names}
    ties += _tied_by_config(found.root, {name for names in held.values() for name in names}, known)
    return Inspection(
        root=found.root,
        kind=found.kind,
        index=found.index,
        files=files,
        ties=tuple(ties),
        faults=tuple(faults),
        notes=found.notes,
    )


def _read(
    found: CheckpointFiles, path: Path
) -> tuple[Sequence[TensorMeta], list[tuple[tuple[str, ...], str]]]:
    if found.kind == "safetensors":
        file = File(path)
        try:
            header = read_header(file)
        finally:
            file.close()
        kept = {a: b for a, b in header.metadata.items() if a not in header.metas and b in header.metas}
        return list(header.metas.values()), [((b, a), f"metadata of {path.name}") for a, b in kept.items()]
    from weights_core.shards import PickledShard

    shard = PickledShard(path)
    try:
        return list(shard.metas.values()), [(names, "one storage") for names in shard.shared()]
    finally:
        shard.close()


def _tied_by_config(root: Path, names: set[str], known: set[str]) -> list[tuple[tuple[str, ...], str]]:
    """Transformers' models leave out an output layer that is tied to the embedding."""
    try:
        config = json.loads((root / "config.json").read_bytes())
    except (OSError, ValueError):
        return []  # a checkpoint need not have one
    if not isinstance(config, dict) or config.get("tie_word_embeddings") is not True:
        return []
    embeddings = sorted(name for name in names if name.endswith("embed_tokens.weight"))
    if not embeddings or "lm_head.weight" in names or "lm_head.weight" in known:
        return []
    return [((embeddings[0], "lm_head.weight"), "tie_word_embeddings in config.json")]


def _split(name: str) -> tuple[str, str]:
    """Split after the first number, `model.layers.3` | `mlp.up_proj.weight`, else before the last dot."""
    match = _INDEXED.match(name)
    if match and match.end("number") < len(name):
        return name[: match.end("number")], name[match.end("number") + 1 :]
    head, _, tail = name.rpartition(".")
    return (head, tail) if head and tail else (name, "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Order numbers by their size: by length, then by digits, as they may be too long for an int."""
    parts = re.split(r"([0-9]+)", name)
    numbers = [part.lstrip("0") for part in parts[1::2]]
    keys = [(0, part) for part in parts]
    keys[1::2] = [(len(number), number) for number in numbers]
    return keys


def _layer_rows(layers: Sequence[Layer]) -> Iterator[tuple[str, ...]]:
    """One row for a run of layers that are alike."""

    def stem(layer: Layer) -> tuple[object, ...]:
        return _LAST_NUMBER.sub("#", layer.name), layer.form

    for _, run in itertools.groupby(layers, key=stem):
        alike = list(run)
        first, last = alike[0], alike[-1]
        each = " each" if len(alike) > 1 else ""
        name = f"{first.name} … {_LAST_NUMBER.findall(last.name)[0]}" if each else first.name
        times = f" ({len(alike)} alike)" if each else ""
        yield name + times, f"{len(first.tensors):,}{each}", _mb(first.nbytes) + each, first.dtypes


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lay out columns: the first to the left, numbers to the right, the last free."""
    table = [titles, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.rjust(width) if i < 3 else cell
            for i, (cell, width) in enumerate(zip(row[1:], widths[1:], strict=True), 1)
        ]
        lines.append("  ".join(cells).rstrip())
    return [*lines, ""]
