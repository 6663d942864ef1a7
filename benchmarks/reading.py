# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint is read, in how much memory, beside what others do on the same files.

    python benchmarks/reading.py table            cold and warm, several shards and one file
    python benchmarks/reading.py limited          the same inside a cgroup of 1 GiB
    python benchmarks/reading.py slices           one rank of four: dim 0 alone, and mixed
    python benchmarks/reading.py growth           100 to 100,000 tensors, 1 to 256 shards

Each run is a fresh process in a cgroup of its own, the readers interleaved in shuffled rounds; the
figures are medians. The destination is prepared memory, every page touched; where the cgroup has a
limit, it is shared memory that this driver has touched, which belongs to no run. Every run's bytes are
checked. "Cold" means that no page of the checkpoint is cached and that the cache is full of other
pages; dropping everything instead would have every process fault its libraries in again. Needs root
for the cgroups, else runs without and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import mmap
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from readers import NEEDS, checksum
from safetensors.torch import save_file

from weights_core.checkpoint import find
from weights_core.shards import open_shards
from weights_core.tensors import LARGE
from weights_core.types import TensorMeta
from weights_core.weightset import normalise

GIB, MIB = 1 << 30, 1 << 20
RANKS = 4
ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
PEERS = ("load_file", "safe_open", "pool", "torch_mmap", "fastsafetensors", "runai")

Cuts = dict[str, list[list[int]]]
"""Begin and end per leading dimension, by tensor."""


@attrs.define
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path
    files: list[Path]
    metas: dict[str, TensorMeta]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(meta.nbytes for meta in self.metas.values())


# Checkpoints --------------------------------------------------------------------------------------


def llama(size: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a bf16 Llama of about `size` bytes, layers of 436 MB."""
    layer = {
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
        "v_proj": (1024, 4096),
        "o_proj": (4096, 4096),
        "gate_proj": (14336, 4096),
        "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
        "norm": (4096,),
    }
    count = max(1, size // (2 * sum(math.prod(shape) for shape in layer.values())))
    return {f"layers.{n}.{name}.weight": shape for n in range(count) for name, shape in layer.items()}


def small(count: int, elements: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of `count` equal tensors."""
    return {f"t.{n}": (elements,) for n in range(count)}


def write(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int, *, pickled: bool) -> Checkpoint:
    """Write a bf16 checkpoint of random bits, also as files of `torch.save` with `pickled`."""
    folder.mkdir(parents=True)
    names = list(shapes)
    generator = torch.Generator().manual_seed(0)
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        tensors = {
            name: torch.randint(-32768, 32768, shapes[name], dtype=torch.int16, generator=generator).view(
                torch.bfloat16
            )
            for name in part
        }
        stem = f"model-{number + 1:05d}-of-{shards:05d}" if shards > 1 else "model"
        save_file(tensors, folder / f"{stem}.safetensors")
        if pickled:
            torch.save(tensors, folder / f"{stem}.bin")
    os.sync()
    opened = open_shards(find(folder))
    metas = {name: meta for shard in opened for name, meta in shard.metas.items()}
    for shard in opened:
        shard.close()
    return Checkpoint(folder, sorted(folder.glob("*.safetensors")), metas)


# Memory -------------------------------------------------------------------------------------------


class Destination:
    """Where every tensor has its place: in memory of each run's own, or `shared` and so no run's."""

    def __init__(self, checkpoint: Checkpoint, cuts: Cuts, *, shared: bool) -> None:
        self.places: dict[str, tuple[int, list[int], str]] = {}
        at = 0
        for name, meta in checkpoint.metas.items():
            shape = cut_shape(meta, cuts.get(name))
            nbytes = 2 * math.prod(shape)
            if nbytes >= LARGE:  # as `weights_core.tensors.empty` places it
                at += ((meta.offset or 0) - at) % mmap.PAGESIZE
            else:
                at += -at % 64
            self.places[name] = (at, shape, "bfloat16")
            at += nbytes
        self.size = -(-at // MIB) * MIB + 16 * MIB
        self.fd: int | None = None
        self._sums: dict[str, int] = {}
        if shared:
            self.fd = os.memfd_create("destination")
            os.truncate(self.fd, self.size)
            with mmap.mmap(self.fd, self.size) as touched:
                for begin in range(0, self.size, MIB):
                    touched[begin : begin + MIB] = bytes(MIB)

    def check(self, checkpoint: Checkpoint, cuts: Cuts, found: dict[str, int]) -> None:
        """Compare sums with those of the files, read in the plainest way."""
        for name, meta in checkpoint.metas.items():
            if name not in self._sums:
                want = expected(meta)
                if name in cuts:
                    want = want[tuple(slice(begin, end) for begin, end in cuts[name])].contiguous()
                self._sums[name] = checksum(want)
            if found[name] != self._sums[name]:
                raise SystemExit(f"wrong bytes in {name}")

    def close(self) -> None:
        """Give shared memory back."""
        if self.fd is not None:
            os.close(self.fd)


def expected(meta: TensorMeta) -> torch.Tensor:
    """Read a tensor directly, so that checking leaves nothing in the page cache."""
    assert meta.file is not None
    assert meta.offset is not None
    begin = meta.offset // mmap.PAGESIZE * mmap.PAGESIZE
    skip = meta.offset - begin
    with mmap.mmap(-1, -(-(skip + meta.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE) as page:
        fd = os.open(meta.file, os.O_RDONLY | os.O_DIRECT)
        try:
            done = 0
            while done < skip + meta.nbytes:
                done += os.preadv(fd, [memoryview(page)[done:]], begin + done)
        finally:
            os.close(fd)
        raw = bytearray(memoryview(page)[skip : skip + meta.nbytes])
    return torch.frombuffer(raw, dtype=torch.int16).view(meta.shape)


def cut_shape(meta: TensorMeta, cut: list[list[int]] | None) -> list[int]:
    """Return the shape of a part of a tensor."""
    given = tuple(slice(begin, end) for begin, end in cut) if cut else None
    return [len(chosen) for chosen in normalise(given, meta.torch_shape)]


# The page cache -----------------------------------------------------------------------------------


def evict(checkpoint: Checkpoint) -> None:
    """Drop every page of a checkpoint from the cache."""
    for file in checkpoint.folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(checkpoint: Checkpoint, suffix: str) -> None:
    """Bring every page of a checkpoint's files of one kind into the cache, and none of the other kind."""
    evict(checkpoint)
    for file in checkpoint.folder.glob(f"*.{suffix}"):
        _read_through(file)


def _read_through(file: Path) -> None:
    buffer = bytearray(8 * MIB)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


@contextlib.contextmanager
def filler(folder: Path, size: int) -> Iterator[Path]:
    """Make a file with nothing in it whose pages are "other data" in the cache."""
    file = folder / "filler"
    with file.open("wb") as stream:
        os.truncate(stream.fileno(), size)
    try:
        yield file
    finally:
        file.unlink()


# Runs ---------------------------------------------------------------------------------------------


class Group:
    """A memory cgroup for one process, of version 1 or 2, or none where they can't be made."""

    def __init__(self, limit: int | None) -> None:
        self.path: Path | None = None
        self.why = ""
        for root in ROOTS:
            if root == ROOTS[1] and "memory" not in _text(root / "cgroup.subtree_control"):
                continue
            path = root / f"weights-reading-{os.getpid()}"
            try:
                path.mkdir()
                if limit is not None:
                    name = "memory.limit_in_bytes" if root == ROOTS[0] else "memory.max"
                    (path / name).write_text(str(limit))
            except OSError as exc:
                self.why = f"{path}: {exc.strerror}"
                continue
            self.path = path
            return
        self.why = self.why or "no memory controller"

    def enter(self) -> None:
        """Move the calling process here."""
        if self.path is not None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Remove the group; what it holds in the page cache goes to its parent."""
        if self.path is not None:
            for _ in range(100):
                try:
                    self.path.rmdir()
                    return
                except OSError:  # a process that has ended may be in it for a moment
                    time.sleep(0.05)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@attrs.frozen
class Setting:
    """What all readers are measured in."""

    checkpoint: Checkpoint
    cold: bool
    cuts: Cuts = attrs.field(factory=dict)
    limit: int | None = None
    settings: dict[str, Any] = attrs.field(factory=dict)


Cost = dict[str, float]


def run(reader: str, setting: Setting, memory: Destination, other: Path) -> Cost | str:
    """Run one reader once; return its cost, or why there is none."""
    if reader in NEEDS and importlib.util.find_spec(NEEDS[reader]) is None:
        return "not installed"
    if reader == "torch_mmap" and not any(setting.checkpoint.folder.glob("*.bin")):
        return "no .bin written"
    if setting.cold:
        evict(setting.checkpoint)
        _read_through(other)
    else:
        warm(setting.checkpoint, "bin" if reader == "torch_mmap" else "safetensors")
    job = {
        "files": [str(file) for file in setting.checkpoint.files],
        "memory": memory.fd,
        "size": memory.size,
        "places": memory.places,
        "slices": setting.cuts,
        "settings": setting.settings,
    }
    group = Group(setting.limit)
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("readers.py")), reader],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            pass_fds=[] if memory.fd is None else [memory.fd],
            preexec_fn=group.enter,
        )
    finally:
        group.close()
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:60]}"
    cost: Cost = json.loads(done.stdout)
    sums: Any = cost.pop("sums")
    if reader not in ("ceiling", "preadv"):
        memory.check(setting.checkpoint, setting.cuts, sums)
    if group.path is None:
        cost["cgroup"] = -1
    return cost


def measure(
    readers: Sequence[str], setting: Setting, rounds: int, other: Path
) -> dict[str, list[Cost] | str]:
    """Run every reader `rounds` times, in another order each round."""
    memory = Destination(setting.checkpoint, setting.cuts, shared=setting.limit is not None)
    found: dict[str, list[Cost] | str] = {reader: [] for reader in readers}
    order = list(readers)
    try:
        for _ in range(rounds):
            random.shuffle(order)
            for reader in order:
                so_far = found[reader]
                if isinstance(so_far, str):
                    continue
                cost = run(reader, setting, memory, other)
                if isinstance(cost, str):
                    found[reader] = cost
                else:
                    so_far.append(cost)
    finally:
        memory.close()
    return found


def median(costs: Sequence[Cost], key: str) -> float:
    """Return the median of one kind of cost."""
    return statistics.median(cost[key] for cost in costs)


def show(title: str, found: dict[str, list[Cost] | str], size: int, against: str) -> None:
    """Print a table; `size` are the bytes that were wanted, `against` the reader that is 1.00."""
    print(f"\n{title}, {size / GIB:.2f} GiB\n")
    print("| reader | s | GiB/s | range | ratio | CPU s/GiB | RSS over, MiB | cgroup over, MiB | disk GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    base = found[against]
    for reader, costs in found.items():
        if isinstance(costs, str):
            print(f"| {reader} | {costs} | | | | | | | |")
            continue
        seconds = median(costs, "seconds")
        rates = [size / GIB / cost["seconds"] for cost in costs]
        ratio = "" if isinstance(base, str) else f"{median(base, 'seconds') / seconds:.2f}"
        group = max(cost["cgroup"] for cost in costs)
        print(
            f"| {reader} | {seconds:.2f} | {size / GIB / seconds:.2f} | {min(rates):.2f}–{max(rates):.2f} "
            f"| {ratio} | {median(costs, 'cpu') * GIB / size:.3f} | {median(costs, 'rss') / MIB:.0f} "
            f"| {'?' if group < 0 else f'{group / MIB:.0f}'} | {median(costs, 'disk') / GIB:.2f} |"
        )
    sys.stdout.flush()


# Modes --------------------------------------------------------------------------------------------


@attrs.frozen
class Options:
    """What was asked for."""

    size: int
    shards: int
    rounds: int
    folder: Path
    other: Path
    bins: bool


def table(options: Options) -> None:
    """Cold and warm, `shards` files and one."""
    for shards in (options.shards, 1):
        with checkpoint(options, llama(options.size), shards) as made:
            cold = Setting(made, cold=True)
            readers = ("ceiling", "parallel_shards", *PEERS)
            title = f"cold, {shards} file{'s' * (shards > 1)}"
            show(title, measure(readers, cold, options.rounds, options.other), made.size, "ceiling")
            readers = ("preadv", "parallel_shards", *PEERS)
            found = measure(readers, Setting(made, cold=False), options.rounds, options.other)
            show(title.replace("cold", "warm"), found, made.size, "preadv")


def limited(options: Options) -> None:
    """In a cgroup of 1 GiB."""
    with checkpoint(options, llama(options.size), options.shards) as made:
        setting = Setting(made, cold=True, limit=GIB)
        readers = ("ceiling", "parallel_shards", "its stream", *PEERS)
        found = measure(readers, setting, options.rounds, options.other)
        show("cold, in a cgroup of 1 GiB", found, made.size, "ceiling")


def slices(options: Options) -> None:
    """One rank of four, beside a full load."""
    with checkpoint(options, llama(options.size), options.shards) as made:
        full = Setting(made, cold=True)
        mixed = {name: share(meta, 1 if _is_row_parallel(name) else 0) for name, meta in made.metas.items()}
        rows = {name: share(meta, 0) for name, meta in made.metas.items()}
        readers = ("parallel_shards", "safe_open")
        show("full", measure(readers, full, options.rounds, options.other), made.size, "parallel_shards")
        for title, cuts in (("dim 0", rows), ("mixed", mixed)):
            found = measure(readers, attrs.evolve(full, cuts=cuts), options.rounds, options.other)
            size = sum(2 * math.prod(cut_shape(m, cuts[n])) for n, m in made.metas.items())
            show(f"one rank of {RANKS}, {title}", found, size, "parallel_shards")


def _is_row_parallel(name: str) -> bool:
    return ".o_proj." in name or ".down_proj." in name


def share(meta: TensorMeta, dim: int) -> list[list[int]]:
    """Return the second rank's part of a tensor, split in dimension `dim`; vectors are split too."""
    cut = [[0, size] for size in meta.shape]
    dim = min(dim, len(cut) - 1)
    size = meta.shape[dim] // RANKS
    cut[dim] = [size, 2 * size]
    return cut


def growth(options: Options) -> None:
    """Many tensors, many shards."""
    for count in (100, 1_000, 10_000, 100_000):
        with checkpoint(options, small(count, 1024), 4) as made:
            found = measure(
                ("parallel_shards", "disk", "load_file"),
                Setting(made, cold=False),
                options.rounds,
                options.other,
            )
            print(f"{count} tensors of 2 KiB, 4 shards, warm, µs a tensor: {_per(found, count)}", flush=True)
    for shards in (1, 4, 16, 64, 256):
        with checkpoint(options, small(1024, options.size // 8 // 2048), shards) as made:
            found = measure(
                ("ceiling", "parallel_shards"), Setting(made, cold=True), options.rounds, options.other
            )
            show(f"cold, {shards} shards", found, made.size, "ceiling")


def _per(found: dict[str, list[Cost] | str], count: int) -> str:
    def one(costs: list[Cost] | str) -> str:
        return costs if isinstance(costs, str) else f"{median(costs, 'seconds') / count * 1e6:.1f}"

    return ", ".join(f"{reader} {one(costs)}" for reader, costs in found.items())


@contextlib.contextmanager
def checkpoint(options: Options, shapes: dict[str, tuple[int, ...]], shards: int) -> Iterator[Checkpoint]:
    """Write a checkpoint for a while."""
    folder = options.folder / "checkpoint"
    try:
        yield write(folder, shapes, shards, pickled=options.bins)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


MODES = {"table": table, "limited": limited, "slices": slices, "growth": growth}


def main() -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written is removed
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--size", type=float, default=8, help="GiB of the checkpoint")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--fill", type=float, default=None, help="GiB of other pages in the cache; default all"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where to write; on the storage to measure")
    parser.add_argument("--no-bin", action="store_true", help="write no .bin twin: half the space")
    given = parser.parse_args()
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    fill = int(given.fill * GIB) if given.fill is not None else free
    missing = [reader for reader, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    group = Group(None)
    if group.path is None:
        print(f"no cgroup of our own, so none is measured or limited: {group.why}")
    group.close()
    if missing:
        print(f"not installed: {', '.join(missing)}; see benchmarks/requirements.txt, and set PYTHONPATH")
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="weights-reading-") as name:
        folder = Path(name)
        with filler(folder, fill) as other:
            options = Options(
                int(given.size * GIB), given.shards, given.rounds, folder, other, not given.no_bin
            )
            MODES[given.mode](options)


if __name__ == "__main__":
    main()
