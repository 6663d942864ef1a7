# SPDX-License-Identifier: Apache-2.0
"""Cut a checkpoint for ranks: in blocks, so memory is flat; resumable; complete at once or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import xxhash

from weights_core import Layout, TensorMeta
from weights_core.checkpoint import CheckpointFiles, find
from weights_core.digest import SIDECAR, content_digest, write_content
from weights_core.errors import CheckpointError
from weights_core.shards import PickledShard, Shard, open_shards
from weights_presharded.committing import Committer, in_order
from weights_presharded.cutting import Cutter, Reader
from weights_presharded.journal import Journal, refuse_others
from weights_presharded.manifest import (
    JOURNAL,
    MANIFEST,
    READY,
    RankEntry,
    RankManifest,
    Ready,
    digest_of,
    rank_folder,
)
from weights_presharded.outputs import Config, Output, outputs
from weights_presharded.plan import Plan
from weights_presharded.rankfiles import (
    MAX_FILE,
    OpenFile,
    OpenFiles,
    RankFile,
    laid_out,
    make_folder,
    naming,
    sync_folder,
    write_whole,
)

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".ot",
    ".npz",
)
_COPY = 1 << 20
_TORN = re.compile(r"(\..+|weights-digests)\.\d+\.part")


@attrs.frozen(kw_only=True)
class Made:
    """What a conversion made. `resumed` counts the bytes that a run before this one had written."""

    folder: Path
    ranks: int
    tensors: int
    nbytes: int
    resumed: int
    copied: tuple[str, ...]
    digest: str
    seconds: float


def shard(
    checkpoint: Path,
    out: Path,
    *,
    size: int,
    plan: Plan | None = None,
    component: str | None = None,
    resume: bool = False,
    digest: str | None = None,
    max_file: int = MAX_FILE,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Cut a checkpoint for `size` tensor-parallel ranks, into a folder of files for each.

    Args:
        checkpoint: a folder, a weights file, or an index.
        out: where to write: an empty or a new folder, or one whose conversion was interrupted.
        size: how many ranks.
        plan: how to cut; by default as Transformers would.
        component: a component of a pipeline.
        resume: go on with a conversion that was interrupted.
        digest: the checkpoint's, `algorithm:hex`, if it is known: else it may have to be computed.
        max_file: bytes of tensors in a file.
        threads: tensors cut at a time; by default one for each of at most four cores.
        progress: told the bytes written and the bytes in all.

    Raises:
        CheckpointError: the checkpoint is not sound, or the folder cannot be written.
        PlanError: the plan does not fit.
    """
    started = time.perf_counter()
    found = find(checkpoint, component)
    if out.resolve() in (found.root.resolve(), *found.root.resolve().parents):
        raise CheckpointError("is or holds the checkpoint itself: give another --out", file=out)
    with contextlib.ExitStack() as stack:
        shards = open_shards(found)
        for opened in shards:
            stack.callback(opened.close)
        job = _Job.of(found, shards, out, size, plan, max_file)
        make_folder(out)
        refuse_others(out)
        journal = Journal(out, job.key, resume=resume)
        stack.callback(journal.close)
        _remove_torn(out)
        if (out / READY).exists():
            return _complete(job, journal, started, resume=resume)
        hashing = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="weights-digest"))
        stop = threading.Event()
        stack.callback(stop.set)  # before the hashing is waited for
        value = hashing.submit(_digest, found, digest, stop)
        digests, resumed = _cut_all(
            job, journal, shards, threads or min(4, len(os.sched_getaffinity(0))), progress
        )
        copied = _copy_others(found, out)
        ready = _write_manifests(job, digests, value.result(), component)
        write_content(out, ready.digest)
        write_whole(out / READY, ready.dumps())
        sync_folder(out.parent)
        journal.remove()
    return job.made(ready, resumed, copied, started)


@attrs.frozen(kw_only=True)
class _Job:
    """What is to be made, decided before anything is written."""

    out: Path
    size: int
    outputs: tuple[Output, ...]
    files: tuple[RankFile, ...]
    key: Mapping[str, Any]
    origin: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        found: CheckpointFiles,
        shards: Sequence[Shard],
        out: Path,
        size: int,
        plan: Plan | None,
        max_file: int,
    ) -> _Job:
        metas = {name: meta for opened in shards for name, meta in opened.metas.items()}
        config = Config(found.root / "config.json")
        if plan is None:
            from weights_presharded.auto import auto_plan

            plan = auto_plan(found.root, metas, config)
        tied = [group for opened in shards if isinstance(opened, PickledShard) for group in opened.shared()]
        due = outputs(plan, metas, size, config, tied)
        stats = [(file.name, file.stat()) for file in found.files]
        key = {
            "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "plan": _told_apart(due),
            "tp": size,
            "file size": max_file,
        }
        planned = laid_out((TensorMeta(o.name, o.shape, o.dtype, o.nbytes) for o in due), max_file)
        origin = {"plan": plan.text, "key": digest_of(repr(sorted(key.items())).encode())}
        return cls(out=out, size=size, outputs=tuple(due), files=tuple(planned), key=key, origin=origin)

    @property
    def home(self) -> dict[str, RankFile]:
        """In which file each tensor lies."""
        return {name: file for file in self.files for name in file.offsets}

    def folder(self, rank: int) -> Path:
        """Return a rank's folder."""
        return self.out / rank_folder(rank, self.size)

    def made(self, ready: Ready, resumed: int, copied: Sequence[str], started: float) -> Made:
        """Return what to tell of it."""
        return Made(
            folder=self.out,
            ranks=self.size,
            tensors=len(self.outputs),
            nbytes=sum(rank.nbytes for rank in ready.ranks),
            resumed=resumed,
            copied=tuple(copied),
            digest=ready.digest,
            seconds=time.perf_counter() - started,
        )


def _digest(found: CheckpointFiles, known: str | None, stop: threading.Event) -> str:
    return known or content_digest(found, threads=1, stop=stop).value


def _told_apart(due: Iterable[Output]) -> str:
    hasher = xxhash.xxh3_128()
    for output in due:
        hasher.update(repr(output).encode())
    return hasher.hexdigest()


def _complete(job: _Job, journal: Journal, started: float, *, resume: bool) -> Made:
    """Return what is there already, if it is what was asked for."""
    ready = Ready.read(job.out)
    journal.remove()
    if not resume:
        raise CheckpointError(
            f"is complete already: it was cut for {ready.axes.get('tp', 1)} ranks", file=job.out
        )
    if ready.origin.get("key") != job.origin["key"]:
        raise CheckpointError("is complete, and was made of another checkpoint or plan", file=job.out)
    return job.made(ready, sum(rank.nbytes for rank in ready.ranks), (), started)


def _remove_torn(out: Path) -> None:
    """Remove the small files that a run before this one was about to write when it was killed."""
    with naming(out):
        for path in (*out.iterdir(), *out.glob("rank-*/.*.part")):
            if _TORN.fullmatch(path.name):
                path.unlink()


def _cut_all(
    job: _Job,
    journal: Journal,
    shards: Sequence[Shard],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, list[str]], int]:
    """Write every tensor of every rank; return the digests by rank, and the bytes that were there."""
    for rank in range(job.size):
        make_folder(job.folder(rank))
    home = job.home
    digests = _still_there(job, journal)
    left = [output for output in job.outputs if output.name not in digests]
    resumed = job.size * sum(output.nbytes for output in job.outputs if output.name in digests)
    total = job.size * sum(output.nbytes for output in job.outputs)
    _check_room(job.out, total - resumed)
    reader, local, stop = Reader(shards), threading.local(), threading.Event()
    files = OpenFiles()

    def cut(output: Output) -> list[str]:
        if not hasattr(local, "cutter"):
            local.cutter = Cutter(reader, stop)
        planned = home[output.name]
        opened = [files.at(job.folder(rank) / planned.name, planned) for rank in range(job.size)]
        made: list[str] = local.cutter.cut(output, opened, planned.offsets[output.name])
        return made

    with contextlib.ExitStack() as stack:
        stack.callback(files.close)
        committer = stack.enter_context(Committer(journal, files))
        written = resumed
        for output, made in stack.enter_context(contextlib.closing(in_order(left, cut, threads, stop))):
            digests[output.name] = made
            written += job.size * output.nbytes
            committer.done(output.name, made, job.size * output.nbytes, home[output.name].name)
            if progress is not None:
                progress(written, total)
        committer.finish()
    for rank in range(job.size):
        for planned in job.files:  # also those that hold nothing, or were written before
            with contextlib.closing(OpenFile(job.folder(rank) / planned.name, planned)) as file:
                file.sync()
    return digests, resumed


def _still_there(job: _Job, journal: Journal) -> dict[str, list[str]]:
    """Return the digests of what a run before this one has written, where its files are as it left them."""
    found: dict[str, list[str]] = {}
    for planned in job.files:
        sizes = set()
        for rank in range(job.size):
            try:
                sizes.add((job.folder(rank) / planned.name).lstat().st_size)
            except FileNotFoundError:
                sizes.add(-1)
        if sizes == {planned.nbytes}:
            for name in planned.offsets:
                digests = journal.done.get(name)
                if isinstance(digests, list) and len(digests) == job.size:
                    found[name] = digests
    return found


def _write_manifests(
    job: _Job, digests: Mapping[str, list[str]], digest: str, component: str | None
) -> Ready:
    home, entries = job.home, []
    for rank in range(job.size):
        folder = job.folder(rank)
        manifest = RankManifest(
            files={file.name: file.nbytes for file in job.files},
            tensors={
                o.name: TensorMeta(o.name, o.shape, o.dtype, o.nbytes, folder / home[o.name].name)
                for o in job.outputs
            },
            digests={o.name: digests[o.name][rank] for o in job.outputs},
            ties={tie: o.name for o in job.outputs for tie in o.ties},
        )
        raw = manifest.dumps()
        write_whole(folder / MANIFEST, raw)
        nbytes = sum(o.nbytes for o in job.outputs)
        entries.append(RankEntry(folder.name, {"tp": rank}, nbytes, digest_of(raw)))
    return Ready(
        layout=Layout.SHARDED,
        digest=digest,
        axes={"tp": job.size},
        ranks=tuple(entries),
        component=component,
        origin=job.origin,
    )


def _copy_others(found: CheckpointFiles, out: Path) -> list[str]:
    """Copy what lies beside the weights: configurations, the tokenizer, the licence."""
    copied = []
    with naming(found.root):
        names = sorted(entry.name for entry in os.scandir(found.root) if entry.is_file())
    for name in names:
        if (
            name.startswith(".")
            or name.endswith((*_WEIGHTS, ".index.json"))
            or name in (SIDECAR, READY, JOURNAL)
        ):
            continue
        with naming(found.root / name), open(found.root / name, "rb") as source:
            write_whole(out / name, iter(partial(source.read, _COPY), b""))
        copied.append(name)
    return copied


def _check_room(out: Path, due: int) -> None:
    room = shutil.disk_usage(out).free
    if due > room:
        raise CheckpointError(f"{due / 1e9:,.2f} GB are needed, and {room / 1e9:,.2f} GB are free", file=out)
