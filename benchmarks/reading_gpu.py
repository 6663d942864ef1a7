# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint reaches the memory of a GPU, beside what others do with the same files.

    python benchmarks/reading_gpu.py --gib 8 --rounds 3 [--cold]

Readers are interleaved in shuffled rounds in one process, which has used the GPU before; figures are
medians in GB/s of the tensors' bytes, from the call to the last byte on the device. The limits are
measured beside them: one pinned buffer copied again and again, and the same files read from the page
cache, or past it, into pinned memory, by as many threads as there are cores. Destinations of ours are
parameters that have memory already, as the peers' are made by them: allocating on a GPU takes no time
that counts. A peer that isn't installed is named as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weights_core as w

MIB = 1 << 20


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a bf16 Llama with layers of 436 MB."""
    sizes = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336, "down": 14336}
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        found |= {f"layers.{layer}.{name}.weight": (rows, 4096) for name, rows in sizes.items()}
        found |= {f"layers.{layer}.{name}.weight": (4096,) for name in ("norm1", "norm2")}
    return found


def write(folder: Path, gib: float, shards: int) -> list[Path]:
    """Write a checkpoint of about `gib` GiB, random bits, and return its files."""
    every = shapes(max(shards, round(gib * 1024 / 416)))
    names = list(every)
    each = -(-len(names) // shards)

    def save(number: int) -> Path:
        generator = torch.Generator().manual_seed(number)
        part = names[number * each : (number + 1) * each]
        tensors = {
            name: torch.randint(-(2**15), 2**15, every[name], dtype=torch.int16, generator=generator).view(
                torch.bfloat16
            )
            for name in part
        }
        file = folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, file)
        return file

    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(save, range(shards)))
    os.sync()
    return files


class Model(nn.Module):
    """Parameters on the GPU by dotted names."""

    def __init__(self, expected: dict[str, torch.Size]) -> None:
        super().__init__()
        for name, shape in expected.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            empty = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            module.register_parameter(last, nn.Parameter(empty, requires_grad=False))


def ours(folder: Path, model: Model, config: dict[str, dict[str, object]], name: str) -> None:
    """Load through the session, into parameters that are there."""
    engine = w.TorchEngine(model, device="cuda")
    w.load(engine, folder, name, config=config, progress="never").lease.close()


def one_by_one(files: list[Path]) -> None:
    """Load file after file with the safetensors library, each to be dropped as the next comes."""
    for file in files:
        load_file(file, device="cuda")


def pool(files: list[Path]) -> None:
    """Load with the safetensors library in eight threads: the thread pool of TensorRT-LLM's PR 14021."""
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda file: load_file(file, device="cuda"), files):
            pass


def runai(files: list[Path]) -> None:
    """Load with runai-model-streamer, to the host and from there."""
    streamer_of = import_module("runai_model_streamer").SafetensorsStreamer
    with streamer_of() as streamer:
        streamer.stream_files([str(file) for file in files])
        for _, tensor in streamer.get_tensors():
            tensor.cuda()


def fast(files: list[Path]) -> None:
    """Load with fastsafetensors, without GPUDirect storage."""
    module = import_module("fastsafetensors")
    loader = module.SafeTensorsFileLoader(module.SingleGroup(), torch.device("cuda:0"), nogds=True)
    loader.add_filenames({0: [str(file) for file in files]})
    buffers = loader.copy_files_to_device()
    for name in buffers.key_to_rank_lidx:
        buffers.get_tensor(name)
    buffers.close()
    loader.close()


def instant(files: list[Path]) -> None:
    """Load with InstantTensor."""
    safe_open = import_module("instanttensor").safe_open
    with safe_open([str(file) for file in files], framework="pt", device=0) as opened:
        for _, tensor in opened.tensors():
            tensor.clone()


def read_all(files: list[Path], *, direct: bool, chunk: int = 8 * MIB) -> None:
    """Read every byte into pinned memory, a chunk per thread at a time: the limit of the storage."""
    threads = min(16, os.cpu_count() or 1)
    fds = [os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for file in files]
    jobs: Iterator[tuple[int, int]] = iter(
        [(fd, begin) for fd in fds for begin in range(0, os.fstat(fd).st_size, chunk)]
    )
    ring = memoryview(torch.empty(threads * chunk, dtype=torch.uint8, pin_memory=True).numpy().data)
    lock = threading.Lock()

    def work(number: int) -> None:
        memory = ring[number * chunk : (number + 1) * chunk]
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            os.preadv(job[0], [memory], job[1])

    started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    for fd in fds:
        os.close(fd)


def copied(nbytes: int) -> float:
    """Return GB/s of copies from one pinned buffer to the GPU."""
    source = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    out = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    out.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(max(1, nbytes // source.numel())):
        out.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return max(1, nbytes // source.numel()) * source.numel() / (time.perf_counter() - begin) / 1e9


def forget(files: list[Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="measure with an empty page cache too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="weights-reading-gpu-", dir=options.folder))
    try:
        measure(folder, options.gib, options.shards, options.rounds, cold=options.cold)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, gib: float, shards: int, rounds: int, *, cold: bool) -> None:
    """Write a checkpoint to `folder` and read it in every way."""
    files = write(folder, gib, shards)
    size = sum(file.stat().st_size for file in files)
    expected = {
        name: torch.Size(shape) for name, shape in shapes(max(shards, round(gib * 1024 / 416))).items()
    }
    model = Model(expected)
    ways: dict[str, Callable[[], None]] = {
        "limit: storage to pinned memory": lambda: read_all(files, direct=False),
        "parallel_shards": lambda: ours(folder, model, {}, "parallel_shards"),
        "disk": lambda: ours(folder, model, {}, "disk"),
        "safetensors, file by file": lambda: one_by_one(files),
        "safetensors, 8 threads (the seed)": lambda: pool(files),
        "runai-model-streamer": lambda: runai(files),
        "fastsafetensors": lambda: fast(files),
        "InstantTensor": lambda: instant(files),
    }
    needs = {"runai-model-streamer": "runai_model_streamer", "fastsafetensors": "fastsafetensors"}
    needs["InstantTensor"] = "instanttensor"
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, {size / 2**30:.2f} GiB in {shards} files")
    print(f"limit: pinned memory to the GPU {copied(8 << 30):.1f} GB/s")
    for state in ("warm", "cold") if cold else ("warm",):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        if state == "cold":
            ways["limit: storage to pinned memory"] = lambda: read_all(files, direct=True)
            for name in ("disk", "runai-model-streamer", "fastsafetensors", "safetensors, file by file"):
                ways.pop(name)
        read_all(files, direct=False)
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                if name in needs and importlib.util.find_spec(needs[name]) is None:
                    continue
                if state == "cold":
                    forget(files)
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                try:
                    ways[name]()
                except Exception as exc:  # noqa: BLE001 - a peer's failure is a result
                    print(f"{name} failed: {type(exc).__name__}: {exc}")
                    continue
                torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begin)
        print(f"\n{state:<36}{'GB/s':>7}   fastest  slowest")
        for name, taken in seconds.items():
            if name in ways and taken:
                rate, best, worst = (
                    size / s / 1e9 for s in (statistics.median(taken), min(taken), max(taken))
                )
                print(f"{name:<36}{rate:>7.1f}   {best:>7.1f}  {worst:>7.1f}")
            elif name in ways:
                print(f"{name:<36}not installed, or failed")
    verify(files, model)


def verify(files: list[Path], model: Model) -> None:
    """Compare what was loaded last with what the files hold."""
    state = model.state_dict()
    for file in files:
        for name, tensor in load_file(file, device="cuda").items():
            if not torch.equal(state[name].view(torch.int16), tensor.view(torch.int16)):
                raise SystemExit(f"{name} differs")
    print("every byte compared: equal")


if __name__ == "__main__":
    main()
