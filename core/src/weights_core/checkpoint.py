# SPDX-License-Identifier: Apache-2.0
"""Which files make up a checkpoint, decided from names and the index alone."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

from weights_core.errors import CheckpointError

Kind: TypeAlias = Literal["safetensors", "torch"]

PIPELINE_INDEX = "model_index.json"

_SUFFIXES: dict[Kind, tuple[str, ...]] = {"safetensors": (".safetensors",), "torch": (".bin", ".pt", ".pth")}
_INDEXES: dict[Kind, str] = {"safetensors": ".safetensors.index.json", "torch": ".bin.index.json"}
_INDEX_OF_VARIANT: dict[Kind, re.Pattern[str]] = {
    "safetensors": re.compile(r".+\.safetensors\.index\.\w+\.json"),
    "torch": re.compile(r".+\.bin\.index\.\w+\.json"),
}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANT = re.compile(  # a stem, a variant, a shard's number before or behind the variant
    rf"(?P<stem>{'|'.join(_STEMS)})(-\d+-of-\d+)?(\.(?P<variant>[A-Za-z]\w*))?(-\d+-of-\d+)?"
)
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)$")
_HUB_ID = re.compile(r"(https?:/+[\w.-]+/|hf:/+)?(?P<id>[\w-][\w.-]*/[\w.-]+|[\w-]+)(/tree/[^/]+)?/?")


@attrs.frozen(kw_only=True)
class CheckpointFiles:
    """The files of one checkpoint, in name order, before any of them is opened.

    `weight_map` is the index's tensor name → file name, if there is an index. `notes` says what
    was passed over.
    """

    root: Path
    kind: Kind
    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def find(path: Path, component: str | None = None, is_pipeline: bool | None = None) -> CheckpointFiles:
    """Find the files of the checkpoint at `path`: a folder, a weights file, or an index.

    An index decides; else all numbered or plain `.safetensors` files; `.bin`, `.pt` and `.pth`
    only where there is no safetensors file. A variant, as `model.fp16.safetensors`, is taken only where
    the plain files are missing. `component` selects a folder of a pipeline.

    Raises:
        CheckpointError: there is no checkpoint, it is incomplete or ambiguous; says what to do.
    """
    must_exist(path)
    if not _is_dir(path):
        return _from_file(path)
    root = _component_root(path, component, is_pipeline)
    names = _listing(root)
    for kind in ("safetensors", "torch"):
        found = _in_folder(root, names, kind)
        if found is not None:
            notes = _other_notes(names, kind, component, is_flat=root == path)
            return attrs.evolve(found, notes=(*found.notes, *notes))
    raise CheckpointError(
        "holds no weights: no .safetensors, .bin, .pt or .pth file"
        + (f"; it is a pipeline of {_quoted(components(path))}" if components(path) else "")
        + ("; GGUF is another format, convert it" if any(n.endswith(".gguf") for n in names) else ""),
        file=root,
    )


def must_exist(path: Path) -> None:
    """Do nothing if there is such a file or folder.

    Raises:
        CheckpointError: there is none; says how to download what may be a hub's name.
    """
    if _mode(path) is None:
        hub_id = _HUB_ID.fullmatch(str(path))
        if hub_id is not None:
            raise CheckpointError(
                f"{str(path)!r} is not here. If it is a hub id, download it first "
                f"(`hf download {hub_id['id']} --local-dir DIR`) and give the folder"
            )
        raise CheckpointError("no such file or folder", file=path)


def components(path: Path) -> tuple[str, ...]:
    """Return the names of a pipeline's components that have weights, or () if `path` is flat.

    Raises:
        CheckpointError: the pipeline's index is not valid.
    """
    index = path / PIPELINE_INDEX
    if not _is_dir(path) or not _is_file(index):
        return ()
    folders = (name for name in sorted(_read_json(index)) if _is_plain_name(name) and name[0] != "_")
    return tuple(name for name in folders if _is_dir(path / name) and _has_weights(path / name))


def disagreements(found: CheckpointFiles, held: Mapping[Path, Collection[str]]) -> Iterator[CheckpointError]:
    """Yield what is wrong between the files of a checkpoint and its index.

    Args:
        found: the checkpoint.
        held: the names of the tensors that each of its files holds.
    """
    home: dict[str, Path] = {}
    for file, names in held.items():
        for name in names:
            if name in home:
                yield CheckpointError(
                    f"is also in {home[name].name}; which of the two is right cannot be known",
                    file=file,
                    tensor=name,
                )
            home.setdefault(name, file)
    for name, place in (found.weight_map or {}).items():
        if name not in home:
            if found.root / place in held:
                yield CheckpointError(
                    f"the index {found.index} places it here, and it is not",
                    file=found.root / place,
                    tensor=name,
                )
        elif home[name].name != place:
            yield CheckpointError(f"the index places it in {place}", file=home[name], tensor=name)
    if not home and len(held) == len(found.files):
        yield CheckpointError("holds no tensor", file=found.root)


def _mode(path: Path) -> int | None:
    """Return what `path` is, as in `stat`, or None if there is no such thing.

    Raises:
        CheckpointError: the system does not tell, for want of permission say.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, ValueError):  # ValueError: a NUL or a lone surrogate in the name
        return None
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror}", file=path) from exc


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(_mode(path) or 0)


def _is_dir(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path) or 0)


def _is_plain_name(name: str) -> bool:
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return name not in (".", "..") and 0 < len(raw) < 256 and b"/" not in raw and b"\0" not in raw


def _listing(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())
    except OSError as exc:
        raise CheckpointError(f"cannot be listed: {exc.strerror}", file=folder) from exc


def _has_weights(folder: Path) -> bool:
    suffixes = _SUFFIXES["safetensors"] + _SUFFIXES["torch"]
    return any(name.endswith(suffixes) for name in _listing(folder))


def _component_root(path: Path, component: str | None, is_pipeline: bool | None) -> Path:
    pipeline = _is_file(path / PIPELINE_INDEX) if is_pipeline is None else is_pipeline
    if not pipeline or component is None:
        return path
    if not _is_plain_name(component):
        raise CheckpointError(f"{component!r} is not the name of a component", file=path)
    if not _is_dir(path / component):
        known = components(path) or tuple(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise CheckpointError(
            f"the pipeline has no component {component!r}; it has {_quoted(known)}", file=path
        )
    return path / component


def _from_file(path: Path) -> CheckpointFiles:
    for kind, suffixes in _SUFFIXES.items():
        if path.name.endswith(_INDEXES[kind]) or _INDEX_OF_VARIANT[kind].fullmatch(path.name):
            return _from_index(path, kind, ())
        if path.suffix in suffixes:
            return CheckpointFiles(root=path.parent, kind=kind, files=(path,))
    raise CheckpointError("is not a weights file: need .safetensors, .bin, .pt, .pth or an index", file=path)


def _in_folder(root: Path, names: list[str], kind: Kind) -> CheckpointFiles | None:
    weights = [name for name in names if name.endswith(_SUFFIXES[kind])]
    indexes = [name for name in names if name.endswith(_INDEXES[kind])]
    if indexes:
        found = _from_index(root / _choose_index(root, indexes, kind), kind, weights)
        _check_single(found, weights)
        return found
    if not weights:
        return None
    chosen = _drop_twins(weights, kind)
    notes = _passed_over(weights, chosen)
    _check_numbering(root, chosen)
    return CheckpointFiles(root=root, kind=kind, files=tuple(root / name for name in chosen), notes=notes)


def _other_notes(names: list[str], kind: Kind, component: str | None, *, is_flat: bool) -> list[str]:
    notes = []
    others = [n for n in names if n.endswith(_SUFFIXES["torch"]) and n.startswith(_STEMS)]
    if kind == "safetensors" and others:
        notes.append(f"passed over {_quoted(others)}: safetensors files are here too, and come first")
    if component is not None and is_flat:
        notes.append(f"this is no pipeline, so all of it was taken for component {component!r}")
    return notes


def _choose_index(root: Path, indexes: list[str], kind: Kind) -> str:
    for stem in _STEMS:
        if stem + _INDEXES[kind] in indexes:
            return stem + _INDEXES[kind]
    if len(indexes) > 1:
        raise CheckpointError(f"has several indexes ({_quoted(indexes)}): give the path of one", file=root)
    return indexes[0]


def _check_single(found: CheckpointFiles, weights: list[str]) -> None:
    """Refuse all weights in one file beside an index of others: engines differ in which they take."""
    assert found.index is not None
    single = found.index.name.removesuffix(".index.json")
    if single in weights and found.root / single not in found.files:
        raise CheckpointError(
            f"holds {single!r} and an index of other files; which of the two is right cannot be known: "
            f"give the path of one",
            file=found.root,
        )


def _drop_twins(weights: list[str], kind: Kind) -> list[str]:
    """Leave out copies of the same weights in another cut, and files that only look like weights."""
    if kind == "torch":
        left = [w for w in weights if w.startswith(_STEMS)] or weights
    else:
        left = [w for w in weights if not w.startswith("consolidated")] or weights
    known = {name: match for name in left if (match := _VARIANT.fullmatch(Path(name).stem))}
    plain = {match["stem"] for match in known.values() if match["variant"] is None}
    return [n for n in left if n not in known or known[n]["variant"] is None or known[n]["stem"] not in plain]


def _passed_over(weights: list[str], chosen: list[str]) -> tuple[str, ...]:
    left = [name for name in weights if name not in set(chosen)]
    return (f"passed over {_quoted(left)}: not part of this checkpoint",) if left else ()


def _check_numbering(root: Path, names: list[str]) -> None:
    series: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _NUMBERED.match(Path(name).stem):
            series.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), numbers in series.items():
        first = 0 if 0 in numbers else 1
        due, last = int(total), first + int(total)
        count = due - sum(first <= number < last for number in numbers)
        if count:
            due_numbers = itertools.takewhile(last.__gt__, itertools.count(first))
            absent = (number for number in due_numbers if number not in numbers)
            listed = ", ".join(map(str, itertools.islice(absent, 5)))
            more = ", …" if count > 5 else ""
            raise CheckpointError(
                f"{count} of {due} shards of {stem!r} are missing: number {listed}{more}", file=root
            )


def _from_index(index: Path, kind: Kind, weights: list[str] | tuple[()]) -> CheckpointFiles:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("is not an index: it has no weight_map of names to file names", file=index)
    if not weight_map:
        raise CheckpointError("the index names no tensor", file=index)
    chosen = sorted(set(weight_map.values()))
    for name in chosen:
        if not _is_plain_name(name) or not name.endswith(_SUFFIXES[kind]):
            raise CheckpointError(f"the index names {name!r}, which is no weights file beside it", file=index)
        if not _is_file(index.parent / name):
            tensor = next(t for t, f in weight_map.items() if f == name)
            raise CheckpointError(
                f"the index {index.name} names this file, and it is missing; download it again",
                file=index.parent / name,
                tensor=tensor,
            )
    return CheckpointFiles(
        root=index.parent,
        kind=kind,
        files=tuple(index.parent / name for name in chosen),
        index=index,
        weight_map=weight_map,
        notes=_passed_over(list(weights), chosen),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror}", file=path) from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"is not valid JSON: {exc}", file=path) from exc
    if not isinstance(parsed, dict):
        raise CheckpointError("is not a JSON object", file=path)
    return parsed


def _quoted(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
