# SPDX-License-Identifier: Apache-2.0
"""Save the weights that an engine holds, each rank its own, to be loaded by equal engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from weights_core import Layout
from weights_core.coverage import listed
from weights_core.digest import check_form, write_content
from weights_core.errors import CheckpointError, EngineError, LoadError, PublishError
from weights_presharded.manifest import (
    JOURNAL,
    MANIFEST,
    READY,
    Maker,
    RankEntry,
    RankManifest,
    Ready,
    combined,
    digest_of,
    rank_folder,
)
from weights_presharded.rankfiles import MAX_FILE, OpenFile, laid_out, make_folder, write_whole

if TYPE_CHECKING:
    import torch

    from weights_core import Engine

T = TypeVar("T")
_BLOCK = 64 << 20
"""Bytes that are brought from a device at a time."""


def save(
    engine: Engine,
    folder: Path | str,
    layout: Layout = Layout.SHARDED,
    *,
    digest: str | None = None,
    max_file: int = MAX_FILE,
    timeout: float = 600.0,
) -> Path:
    """Save an engine's weights, as it holds them in `layout`; every rank calls it.

    SHARDED weights are there between `apply` and the engine's post-load. `format="presharded"` loads
    them into equal engines: of the same name, version, model, dtype, quantisation and topology.

    Args:
        engine: what holds the weights.
        folder: where to write: the same for all ranks, on storage that all of them see.
        layout: SHARDED, or FINAL where the engine's weights may be shared then.
        digest: that of the checkpoint they came from, `algorithm:hex`: engines that loaded them here
            and engines that loaded the checkpoint then know that they have the same. By default a
            digest of what is saved.
        max_file: bytes of tensors in a file.
        timeout: seconds that a rank waits for the others.

    Returns:
        The folder, which is complete.

    Raises:
        ValueError: `digest` is none.
        PublishError: the engine cannot have its weights read in `layout`, or does not hold all of them.
        CheckpointError: the folder is complete already, or cannot be written.
        LoadError: another rank failed, or did not come in time.
    """
    if digest is not None:
        check_form(digest)
    folder = Path(folder)
    info = engine.info
    world = info.topology.world

    def together(work: Callable[[], T]) -> list[T]:
        """Return every rank's result of a step that all ranks must come through."""
        mine: tuple[T | None, str]
        error: Exception | None = None
        try:
            mine = work(), ""
        except Exception as exc:  # noqa: BLE001 - raised once the other ranks know
            mine, error = (None, str(exc) or type(exc).__name__), exc
        try:
            everyone: Sequence[Any] = engine.gather(mine, timeout) if world.size > 1 else [mine]
        except TimeoutError as exc:
            why = f"rank {world.rank} waited {timeout:g} s for the other ranks, and there is no {READY}"
            raise LoadError(why) from (error or exc)
        if error is not None:
            raise error
        for rank, (_, why) in enumerate(everyone):
            if why:
                raise LoadError(f"rank {rank} could not save its weights: {why}")
        return [result for result, _ in everyone]

    def check() -> Mapping[str, torch.Tensor]:
        make_folder(folder)
        return _held(engine, layout, folder)

    tensors: list[Mapping[str, torch.Tensor]] = []
    together(lambda: tensors.append(check()))
    written = together(lambda: _write_rank(tensors.pop(), folder, world.rank, world.size, max_file))
    axes = {name: axis.size for name, axis in info.topology.axes.items()} or {"tp": 1}
    places = together(lambda: {name: axis.rank for name, axis in info.topology.axes.items()} or {"tp": 0})

    def complete() -> None:
        if world.rank != 0:
            return
        ready = Ready(
            layout=layout,
            digest=digest or combined(manifest for manifest, _ in written),
            axes=axes,
            ranks=tuple(
                RankEntry(rank_folder(rank, world.size), places[rank], nbytes, manifest)
                for rank, (manifest, nbytes) in enumerate(written)
            ),
            component=info.component,
            maker=Maker.of(info),
        )
        write_content(folder, ready.digest)
        write_whole(folder / READY, ready.dumps())

    together(complete)
    return folder


def _held(engine: Engine, layout: Layout, folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the engine's tensors, if all of them may be saved.

    Raises:
        PublishError, CheckpointError: as `save`.
    """
    import torch

    info = engine.info
    if layout is Layout.CHECKPOINT or layout not in info.shareable:
        raise PublishError(f"engine {info.name} does not share {layout.value} weights, so they are not saved")
    for name in (READY, JOURNAL):
        if (folder / name).exists():
            raise CheckpointError(f"has a {name}: give the path of another folder", file=folder)
    tensors = engine.tensors(layout)
    missing = [name for name in engine.expected(layout) if name not in tensors]
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if missing or empty:
        raise PublishError(f"refusing to save a model that is not filled: {listed(missing or empty)}")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise PublishError(f"tensor {name!r} is {tensor.layout}: only strided ones can be saved")
    return tensors


def _write_rank(
    tensors: Mapping[str, torch.Tensor], folder: Path, rank: int, size: int, max_file: int
) -> tuple[str, int]:
    """Write one rank's files; return the digest of its manifest, and its bytes."""
    own = folder / rank_folder(rank, size)
    make_folder(own)
    from weights_core.tensors import meta_of

    stored, ties = _untied(tensors)
    try:
        metas = {name: meta_of(name, tensor) for name, tensor in stored.items()}
    except EngineError as exc:
        raise PublishError(exc.brief) from exc
    planned = laid_out(metas.values(), max_file)
    digests = {}
    for plan in planned:
        with closing(OpenFile(own / plan.name, plan)) as file:
            for name, offset in plan.offsets.items():
                digests[name] = _write(stored[name], file, offset)
                metas[name] = attrs.evolve(metas[name], file=own / plan.name)
            file.sync()
    manifest = RankManifest({p.name: p.nbytes for p in planned}, metas, digests, ties)
    raw = manifest.dumps()
    write_whole(own / MANIFEST, raw)
    return digest_of(raw), sum(meta.nbytes for meta in metas.values())


def _write(tensor: torch.Tensor, file: OpenFile, offset: int) -> str:
    from weights_presharded.cutting import Sink, view_of

    sink = Sink(0, [file], offset)
    for block in _blocks(tensor):
        sink.write(view_of(block))
    return sink.digest


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor in host memory, piece by piece."""
    import torch

    from weights_core.tensors import as_bytes

    flat = as_bytes(tensor)
    for begin in range(0, flat.numel(), _BLOCK):
        yield flat[begin : begin + _BLOCK].to(torch.device("cpu"))


def _untied(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors that are stored, and the further names of each."""
    first: dict[object, str] = {}
    stored: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            ties[name] = first[place]
        else:
            first[place] = name
            stored[name] = tensor
    return stored, ties
