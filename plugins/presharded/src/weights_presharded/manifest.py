# SPDX-License-Identifier: Apache-2.0
"""What a presharded folder says of itself: `READY.json`, and each rank's `manifest.json`.

`READY.json` is written last, so a folder that has it is complete. It names each rank's folder and the
digest of that rank's manifest, which has the digest of every tensor: a rank reads nothing of another's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs
import xxhash

from weights_core import Layout, TensorMeta, dtypes
from weights_core.digest import check_form
from weights_core.errors import CheckpointError, IdentityMismatchError
from weights_core.types import Axis, EngineInfo

READY = "READY.json"
MANIFEST = "manifest.json"
JOURNAL = "sharding.journal"
SCHEMA = "weights.presharded/1"
RANK_SCHEMA = "weights.presharded-rank/1"
RANK_FOLDER = re.compile(r"rank-\d+-of-\d+")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TENSOR_DIGEST = re.compile(r"xxh3_128:[0-9a-f]{32}")


@attrs.frozen
class Maker:
    """The engine that saved its own weights; only an equal one may load them."""

    name: str
    version: str
    model: str
    dtype: str | None
    quantization: str | None

    @classmethod
    def of(cls, info: EngineInfo) -> Maker:
        """Return what an engine says of itself."""
        return cls(info.name, info.version, info.model, info.dtype, info.quantization)


@attrs.frozen
class RankEntry:
    """One rank: its folder, its place on each axis, its bytes, and its manifest's digest."""

    folder: str
    axes: Mapping[str, int]
    nbytes: int
    manifest: str


@attrs.frozen(kw_only=True)
class Ready:
    """A complete folder.

    `digest` is that of the checkpoint it was made of, `axes` are the sizes of the axes it was cut for.
    `maker` is the engine that saved it, or None if it was cut by a plan; `origin` says of what and how
    it was made, so that a run can be told from another.
    """

    layout: Layout
    digest: str
    axes: Mapping[str, int]
    ranks: tuple[RankEntry, ...]
    component: str | None = None
    maker: Maker | None = None
    origin: Mapping[str, Any] = attrs.field(factory=dict)

    def dumps(self) -> bytes:
        """Return the text of `READY.json`."""
        told = {
            "schema": SCHEMA,
            "layout": self.layout.value,
            "digest": self.digest,
            "axes": dict(self.axes),
            "component": self.component,
            "maker": attrs.asdict(self.maker) if self.maker else None,
            "origin": dict(self.origin),
            "ranks": [
                {"folder": r.folder, "axes": dict(r.axes), "bytes": r.nbytes, "manifest": r.manifest}
                for r in self.ranks
            ],
        }
        return json.dumps(told, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> Ready:
        """Read a folder's `READY.json`, and believe nothing in it.

        Raises:
            CheckpointError: it is none, or contradicts itself.
        """
        path = folder / READY
        given = _json_of(path, _read(path), SCHEMA)
        try:
            axes = {_text(name): _count(size, 1) for name, size in _table(given["axes"]).items()}
            ranks = tuple(_rank_entry(entry, axes) for entry in given["ranks"])
            maker = given["maker"]
            found = cls(
                layout=Layout(given["layout"]),
                digest=check_form(_text(given["digest"])),
                axes=axes,
                ranks=ranks,
                component=_optional(given["component"]),
                maker=None if maker is None else _maker(_table(maker)),
                origin=_table(given["origin"]),
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(f"is not a valid {READY}: {_why(exc)}", file=path) from exc
        places = {tuple(sorted(rank.axes.items())) for rank in ranks}
        if not ranks or len(places) != len(ranks) or len({r.folder for r in ranks}) != len(ranks):
            raise CheckpointError("names no rank, or one twice", file=path)
        if found.layout is Layout.CHECKPOINT:
            raise CheckpointError("is of the layout checkpoint, which is not cut for ranks", file=path)
        return found

    def rank_for(self, info: EngineInfo, folder: Path) -> RankEntry:
        """Return the rank whose weights an engine's rank needs.

        Raises:
            IdentityMismatchError: it was cut for another topology, or saved by another engine; says what
                is there and what is needed.
        """
        need = {name: axis for name, axis in info.topology.axes.items() if axis.size > 1}
        have = {name: size for name, size in self.axes.items() if size > 1}
        if {name: axis.size for name, axis in need.items()} != have:
            raise _other_topology(folder, have, {name: axis.size for name, axis in need.items()})
        if self.maker is not None and self.maker != Maker.of(info):
            self._refuse_engine(self.maker, Maker.of(info), folder)
        if self.component is not None and self.component != info.component:
            raise IdentityMismatchError(
                f"{folder} holds component {self.component!r}, the engine is for {info.component!r}",
                fields={"component": (info.component, self.component)},
            )
        for rank in self.ranks:
            if all(rank.axes.get(name, 0) == axis.rank for name, axis in need.items()):
                return rank
        raise CheckpointError(f"has no rank {_ranked(need)}", file=folder / READY)

    @staticmethod
    def _refuse_engine(there: Maker, here: Maker, folder: Path) -> NoReturn:
        pairs = {f.name: (getattr(here, f.name), getattr(there, f.name)) for f in attrs.fields(Maker)}
        fields = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        listed = "; ".join(
            f"{name}: need {mine!r}, got {theirs!r}" for name, (mine, theirs) in fields.items()
        )
        raise IdentityMismatchError(
            f"{folder} was saved by another engine, whose parameters may mean something else: {listed}. "
            "Save it again with this one",
            fields=fields,
        )


@attrs.frozen
class RankManifest:
    """What one rank's folder holds.

    `files` maps names to bytes, `tensors` names to where they lie, `digests` names to digests of their
    bytes. `ties` maps further names of a tensor to the one it is stored under.
    """

    files: Mapping[str, int]
    tensors: Mapping[str, TensorMeta]
    digests: Mapping[str, str]
    ties: Mapping[str, str]

    def dumps(self) -> bytes:
        """Return the text of `manifest.json`."""
        rows = {
            name: [meta.dtype, list(meta.shape), meta.file.name if meta.file else "", self.digests[name]]
            for name, meta in self.tensors.items()
        }
        told = {"schema": RANK_SCHEMA, "files": self.files, "tensors": rows, "ties": self.ties}
        return json.dumps(told, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path, digest: str | None) -> RankManifest:
        """Read a rank's manifest, and believe nothing in it.

        Args:
            folder: the rank's.
            digest: what `READY.json` says its digest is.

        Raises:
            CheckpointError: it is another one, or contradicts itself; names the tensor.
        """
        path = folder / MANIFEST
        raw = _read(path)
        if digest is not None and digest_of(raw) != digest:
            raise CheckpointError(f"is not the manifest that {READY} names: its digest differs", file=path)
        given = _json_of(path, raw, RANK_SCHEMA)
        try:
            files = {_plain(name): _count(size) for name, size in _table(given["files"]).items()}
            tensors: dict[str, TensorMeta] = {}
            digests: dict[str, str] = {}
            for name, row in _table(given["tensors"]).items():
                tensors[name], digests[name] = _tensor(folder, files, name, row)
            ties = {name: _text(stored) for name, stored in _table(given["ties"]).items()}
        except (ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(f"is not a valid manifest: {_why(exc)}", file=path) from exc
        for name, stored in ties.items():
            if name in tensors or stored not in tensors:
                raise CheckpointError(
                    f"is tied to {stored!r}, which is not stored, or is itself", file=path, tensor=name
                )
        return cls(files, tensors, digests, ties)


def digest_of(raw: bytes | memoryview) -> str:
    """Return the digest of bytes, as manifests hold it."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(raw)}"


def rank_folder(rank: int, size: int) -> str:
    """Return the name of a rank's folder."""
    return f"rank-{rank}-of-{size}"


def files_of(count: int) -> list[str]:
    """Return the names of a rank's files."""
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def combined(digests: Iterable[str]) -> str:
    """Return one digest of several, in their order."""
    return digest_of("\n".join(digests).encode())


def said(axes: Mapping[str, int]) -> str:
    """Return the sizes of axes for people."""
    return ", ".join(f"{name} {size}" for name, size in sorted(axes.items())) or "one rank (tp 1)"


def _ranked(axes: Mapping[str, Axis]) -> str:
    return ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in sorted(axes.items()))


def _other_topology(folder: Path, have: Mapping[str, int], need: Mapping[str, int]) -> IdentityMismatchError:
    cure = f"`weights shard CHECKPOINT --tp {need.get('tp', 1)} --out DIR`" if need.keys() <= {"tp"} else ""
    return IdentityMismatchError(
        f"{folder} was cut for {said(have)}, this engine needs {said(need)}; what is cut is never cut "
        f"again{': run ' + cure + ' on the whole checkpoint' if cure else ''}",
        fields={"axes": (dict(need), dict(have))},
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror}", file=path) from exc


def _json_of(path: Path, raw: bytes, schema: str) -> dict[str, Any]:
    try:
        given = json.loads(raw.decode())
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"is not valid JSON: {exc}", file=path) from exc
    if not isinstance(given, dict) or given.get("schema") != schema:
        found = given.get("schema") if isinstance(given, dict) else type(given).__name__
        raise CheckpointError(f"is of the schema {found!r}, need {schema!r}", file=path)
    return given


def _rank_entry(entry: Any, axes: Mapping[str, int]) -> RankEntry:
    place = {_text(name): _count(rank) for name, rank in _table(entry["axes"]).items()}
    if place.keys() != axes.keys() or any(rank >= axes[name] for name, rank in place.items()):
        raise ValueError(f"rank {place} is not in {dict(axes)}")
    digest = _text(entry["manifest"])
    if not _TENSOR_DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is no digest")
    return RankEntry(_plain(entry["folder"]), place, _count(entry["bytes"]), digest)


def _maker(given: Mapping[str, Any]) -> Maker:
    return Maker(
        name=_text(given["name"]),
        version=_text(given["version"]),
        model=_text(given["model"]),
        dtype=_optional(given["dtype"]),
        quantization=_optional(given["quantization"]),
    )


def _tensor(folder: Path, files: Mapping[str, int], name: str, row: Any) -> tuple[TensorMeta, str]:
    dtype, sizes, file, digest = row
    if dtype not in dtypes.BITS:
        raise ValueError(f"tensor {name!r} has the dtype {dtype!r}")
    if file not in files:
        raise ValueError(f"tensor {name!r} is in {file!r}, which is none of its files")
    if not isinstance(digest, str) or not _TENSOR_DIGEST.fullmatch(digest):
        raise ValueError(f"tensor {name!r} has the digest {digest!r}")
    if not isinstance(sizes, list):
        raise TypeError(f"tensor {name!r} has the shape {sizes!r}")
    shape = tuple(_count(size) for size in sizes)
    return TensorMeta(name, shape, dtype, dtypes.nbytes(dtype, shape), folder / file), digest


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no table")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)


def _plain(value: Any) -> str:
    """Return a name that leads nowhere but into its own folder."""
    if not isinstance(value, str) or not _PLAIN.fullmatch(value):
        raise ValueError(f"{value!r} is not the plain name of a file")
    return value


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(f"{value!r} is not a count")
    return value


def _why(exc: Exception) -> str:
    return f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)


def places(size: int) -> Sequence[Mapping[str, int]]:
    """Return the place of every rank of plain tensor parallelism."""
    return [{"tp": rank} for rank in range(size)]
