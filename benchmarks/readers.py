# SPDX-License-Identifier: Apache-2.0
"""The readers that `reading.py` compares, each run in a process of its own.

Every reader brings all tensors of a checkpoint into the same prepared memory: pages that the driver
has touched, laid out as `TorchEngine` would. Run as a program it takes a job as JSON, reads, and
prints what that cost.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import torch

from weights_core.weightset import Slices, Target

CEILING_THREADS = 8
CEILING_CHUNK = 4 << 20


@attrs.frozen
class Job:
    """Files to read, and the memory for it.

    `places` maps a tensor to byte, shape and dtype there; `memory` is a descriptor of `size` bytes, or
    None for memory of the reader's process. `slices` maps a tensor to begin and end per leading
    dimension.
    """

    files: list[str]
    memory: int | None
    size: int
    places: dict[str, tuple[int, list[int], str]]
    slices: dict[str, list[list[int]]]
    settings: dict[str, Any]

    def slices_of(self, name: str) -> Slices | None:
        """Return the part of a tensor that is wanted, or None for all of it."""
        given = self.slices.get(name)
        return None if given is None else tuple(slice(begin, end) for begin, end in given)


class Memory:
    """The prepared memory: every page is there, in huge pages if it is this process's own."""

    def __init__(self, job: Job) -> None:
        if job.memory is None:
            self.map = mmap.mmap(-1, job.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.map.madvise(mmap.MADV_HUGEPAGE)
        else:
            self.map = mmap.mmap(job.memory, job.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        flat = torch.frombuffer(self.map, dtype=torch.uint8)
        flat.fill_(0xA5)
        self.tensors = {
            name: _typed(flat, at, shape, getattr(torch, dtype))
            for name, (at, shape, dtype) in job.places.items()
        }

    def sums(self) -> dict[str, int]:
        """Return a sum for each tensor."""
        return {name: checksum(tensor) for name, tensor in self.tensors.items()}


def checksum(tensor: torch.Tensor) -> int:
    """Return a sum of a contiguous tensor's bytes that tells blocks of 4 KiB in another order."""
    words = tensor.view(-1).view(torch.int64)
    blocks = words.view(-1, 512 if words.numel() % 512 == 0 else words.numel()).sum(1)
    return int((blocks * torch.arange(1, len(blocks) + 1)).sum())


def _typed(flat: torch.Tensor, at: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return flat[at : at + size].view(dtype).view(shape)


def _put(job: Job, memory: Memory, name: str, tensor: torch.Tensor) -> None:
    """Bring a tensor that a peer has delivered to its place: this touches every byte of it."""
    part = job.slices_of(name)
    memory.tensors[name].copy_(tensor if part is None else tensor[part])


def ceiling(job: Job, memory: Memory) -> None:
    """Read the files directly, whole, in parallel: as fast as the storage is."""
    _raw(job, memory, os.O_DIRECT)


def preadv(job: Job, memory: Memory) -> None:
    """Read the files through the page cache, whole, in parallel."""
    _raw(job, memory, 0)


def _raw(job: Job, memory: Memory, flags: int) -> None:
    view = memoryview(memory.map)
    with contextlib.ExitStack() as files:
        chunks: list[tuple[int, int, int]] = []
        at = 0
        for path in job.files:
            fd = os.open(path, os.O_RDONLY | flags)
            files.callback(os.close, fd)
            size = os.fstat(fd).st_size
            chunks += [(fd, offset, at + offset) for offset in range(0, size, CEILING_CHUNK)]
            at += -(-size // CEILING_CHUNK) * CEILING_CHUNK
        due, lock = iter(chunks), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    chunk = next(due, None)
                if chunk is None:
                    return
                fd, offset, to = chunk
                to = to % (job.size - CEILING_CHUNK) // mmap.PAGESIZE * mmap.PAGESIZE
                os.preadv(fd, [view[to : to + CEILING_CHUNK]], offset)

        threads = [threading.Thread(target=work) for _ in range(CEILING_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def ours(job: Job, memory: Memory) -> None:
    """Read with `parallel_shards`."""
    weights = _ours(job)
    with contextlib.closing(weights):
        for _ in weights.fill([Target(n, t, job.slices_of(n)) for n, t in memory.tensors.items()]):
            pass


def streamed(job: Job, memory: Memory) -> None:
    """Stream with `parallel_shards`, and copy what comes."""
    with contextlib.closing(_ours(job)) as weights:
        for name, tensor in weights.stream():
            _put(job, memory, name, tensor)


def _ours(job: Job) -> Any:
    from weights_core import EngineInfo, LoadRequest, TorchEngine
    from weights_parallel_shards.plugin import ParallelShardsConfig, ParallelShardsPlugin

    folder = Path(job.files[0]).parent
    request = LoadRequest(checkpoint=folder, engine=EngineInfo(name="benchmark", version="1"))
    plugin = ParallelShardsPlugin(ParallelShardsConfig(**job.settings))
    return plugin.load_weights(request, TorchEngine(torch.nn.Module()), _Nothing())


class _Nothing:
    def open(self) -> Any:
        raise NotImplementedError


def disk(job: Job, memory: Memory) -> None:
    """Read with the core's own source."""
    from weights_core.checkpoint import find
    from weights_core.disk import ShardSet
    from weights_core.shards import open_shards

    with contextlib.closing(ShardSet(open_shards(find(Path(job.files[0]).parent)), provider="disk")) as w:
        for _ in w.fill(Target(n, t, job.slices_of(n)) for n, t in memory.tensors.items()):
            pass


def load_file(job: Job, memory: Memory) -> None:
    """Read with safetensors, file by file."""
    from safetensors.torch import load_file

    for path in job.files:
        for name, tensor in load_file(path).items():
            _put(job, memory, name, tensor)


def pool(job: Job, memory: Memory) -> None:
    """Read with safetensors, four files at a time: TensorRT-LLM's way."""
    from safetensors.torch import load_file

    def one(path: str) -> None:
        for name, tensor in load_file(path).items():
            _put(job, memory, name, tensor)

    with ThreadPoolExecutor(min(4, len(job.files))) as executor:
        list(executor.map(one, job.files))


def safe_open(job: Job, memory: Memory) -> None:
    """Read with safetensors, tensor by tensor, or slice by slice."""
    import safetensors

    for path in job.files:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = job.slices_of(name)
                if part is None:
                    _put(job, memory, name, file.get_tensor(name))
                else:
                    memory.tensors[name].copy_(file.get_slice(name)[part])


def torch_mmap(job: Job, memory: Memory) -> None:
    """Read files of `torch.save` of the same tensors, mapped."""
    for path in job.files:
        loaded = torch.load(Path(path).with_suffix(".bin"), mmap=True, weights_only=True)
        for name, tensor in loaded.items():
            _put(job, memory, name, tensor)


def fastsafetensors(job: Job, memory: Memory) -> None:
    """Read with fastsafetensors, file by file, without GPU Direct Storage."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # pyright: ignore[reportMissingImports]

    for path in job.files:
        loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: [path]})
        buffer = loader.copy_files_to_device()
        for name in list(buffer.key_to_rank_lidx):
            _put(job, memory, name, buffer.get_tensor(name))
        buffer.close()
        loader.close()


def runai(job: Job, memory: Memory) -> None:
    """Read with runai-model-streamer."""
    from runai_model_streamer import SafetensorsStreamer  # pyright: ignore[reportMissingImports]

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(job.files)
        for name, tensor in streamer.get_tensors():
            _put(job, memory, name, tensor)


Reader = Callable[[Job, Memory], None]
READERS: dict[str, Reader] = {
    "ceiling": ceiling,
    "preadv": preadv,
    "parallel_shards": ours,
    "its stream": streamed,
    "disk": disk,
    "load_file": load_file,
    "safe_open": safe_open,
    "pool": pool,
    "torch_mmap": torch_mmap,
    "fastsafetensors": fastsafetensors,
    "runai": runai,
}
NEEDS = {"fastsafetensors": "fastsafetensors", "runai": "runai_model_streamer"}


def main() -> None:
    """Do the job on standard input with the reader that is named; print the cost as JSON."""
    name, job = sys.argv[1], Job(**json.load(sys.stdin))
    memory = Memory(job)
    warm_up(name)
    gc.collect()  # what the imports have left behind is not this reader's to clear up
    usage, peak = _cgroup("usage"), _cgroup("peak")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    if peak is not None:
        with contextlib.suppress(OSError):
            peak.write_text("0")
    before = _costs()
    over = usage.read_text() if usage is not None else "0"
    READERS[name](job, memory)
    after = _costs()
    cost = {key: after[key] - before[key] for key in ("seconds", "cpu", "disk")}
    cost["rss"] = after["peak_rss"] - before["rss"]
    cost["cgroup"] = int(peak.read_text()) - int(over) if peak is not None else -1
    print(json.dumps({**cost, "sums": memory.sums()}))


def warm_up(name: str) -> None:
    """Import what the reader needs; that is not what is measured."""
    for module in (
        "safetensors.torch",
        "weights_core.api",
        "weights_parallel_shards.reader",
        NEEDS.get(name),
    ):
        if module:
            __import__(module)


def _costs() -> dict[str, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = dict(_pairs(Path("/proc/self/status")))
    io = dict(_pairs(Path("/proc/self/io")))
    return {
        "seconds": time.perf_counter(),
        "cpu": used.ru_utime + used.ru_stime,
        "disk": int(io["read_bytes"]),
        "rss": int(status["VmRSS"].split()[0]) << 10,
        "peak_rss": int(status["VmHWM"].split()[0]) << 10,
    }


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        yield key, value.strip()


def _cgroup(what: str) -> Path | None:
    """Return the file that tells this process's cgroup's memory, or its peak."""
    v1 = {"usage": "memory.usage_in_bytes", "peak": "memory.max_usage_in_bytes"}
    v2 = {"usage": "memory.current", "peak": "memory.peak"}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for names, controller, root in ((v1, "memory", "memory"), (v2, "", "")):
            file = Path("/sys/fs/cgroup", root, path.lstrip("/"), names[what])
            if controllers == controller and path != "/" and file.exists():
                return file
    return None


if __name__ == "__main__":
    main()
