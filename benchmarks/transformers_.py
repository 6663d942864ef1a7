# SPDX-License-Identifier: Apache-2.0
"""How long a Transformers model takes through weights, and what memory, beside `from_pretrained`.

    python benchmarks/transformers_.py --gib 1 --rounds 5                  on the CPU
    tests/gpu/run.sh -- python3 benchmarks/transformers_.py --gib 8 --rounds 2 --warm-only --device cuda
                                                                           on a GPU, under 4 minutes
    python benchmarks/transformers_.py --path CHECKPOINT                   one that is there

The checkpoint is made here from a configuration, of random numbers. Every load is in a process of its
own, which has loaded a tiny model both ways before; ways and rounds are shuffled. `loaded` is until the
call returns, `usable` until every page has been touched once: on the CPU `from_pretrained` returns views
of files that are mapped, and has read next to nothing by then. Cold: the files are dropped from the
page cache before. Host peak is of resident memory over that at the start, less the model if it is on the
CPU; it counts pages of mapped files as the kernel does. Device peak is of all that was in use.

    python benchmarks/transformers_.py --touch                             in a virtual machine, to the CPU

A virtual machine may get its memory from its host at the first touch, page by page (seen: 4 s per GiB, and
again for what was free for some seconds), which is counted for whoever is given those pages. `--touch` has
memory that is free touched right before each load, and holds what no load needs.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weights_core.checkpoint import find
from weights_core.digest import content_digest

MIB = 1 << 20
WAYS = {
    "from_pretrained": "",
    "disk": "parallel_shards,consumable",
    "parallel_shards": "consumable",
    "consumable + parallel_shards": "",
    "gms first": "",
    "gms second": "",
}
"""Each way, and the plugins that are kept out of it."""


def main() -> None:
    """Make a checkpoint, measure every way, print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--path", type=Path, help="a checkpoint, instead of one made here")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--kind", choices=["llama", "mixtral"], default="llama")
    parser.add_argument("--dtype", help="what to load as, if not as it is stored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warm-only", action="store_true")
    parser.add_argument("--touch", action="store_true", help="of a virtual machine: have free memory at hand")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SOCKET"), help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given, *given.one)
        return
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        path = given.path or made(Path(folder) / "model", given.kind, given.gib)
        made(Path(folder) / "tiny", "llama", 0.0)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        print(f"{size / 2**30:.2f} GiB in {len(list(path.glob('*.safetensors')))} files, to {given.device}")
        time.sleep(0.2)  # a digest is kept of files that have settled
        print(f"digest, kept for gms: {content_digest(find(path)).seconds:.2f} s")
        held = touched(free() - 2 * size - 2 * 2**30) if given.touch else None
        ways = [way for way in WAYS if way in given.ways.split(",")]
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for cache in ("warm",) if given.warm_only else ("cold", "warm"):
            for _ in range(given.rounds):
                for way in random.sample(ways, len(ways)):
                    told = measured(given, path, Path(folder), way, cold=cache == "cold")
                    found.setdefault((cache, way), []).append(told)
                    print(f"  {cache}, {way}: {told['loaded']:.3f} s", flush=True)
        table(found)
        if held is not None:
            held.close()


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """Print medians, and ratios to `from_pretrained` in the same run."""
    keys = ("loaded", "usable", "host", "device")
    medians = {
        which: {key: statistics.median(run[key] for run in runs) for key in keys}
        for which, runs in found.items()
    }
    print(f"{'':36}{'loaded s':>10}{'usable s':>10}{'ratio':>8}{'host MiB':>10}{'device MiB':>12}")
    for (cache, way), value in medians.items():
        base = medians.get((cache, "from_pretrained"), value)["usable"]
        print(
            f"{cache + ', ' + way:36}{value['loaded']:10.3f}{value['usable']:10.3f}"
            f"{value['usable'] / base:8.2f}{value['host'] / MIB:10.0f}{value['device'] / MIB:12.0f}"
        )


# The checkpoint -----------------------------------------------------------------------------------


def configuration(kind: str, gib: float) -> Any:
    """Return the configuration of a model of about `gib` GiB in bf16; 0 for a tiny one."""
    from transformers import LlamaConfig, MixtralConfig

    if not gib:
        return LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    width = 4096 if gib >= 4 else 1024
    ffn = width * 7 // 2
    common = {
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    attention = 2.5 * width * width
    mlp = 3 * width * ffn * (8 if kind == "mixtral" else 1)
    layers = max(1, round((gib * 2**30 / 2 - 2 * 32000 * width) / (attention + mlp)))
    if kind == "mixtral":
        return MixtralConfig(**common, num_local_experts=8, num_hidden_layers=layers)
    return LlamaConfig(**common, num_hidden_layers=layers)


def made(path: Path, kind: str, gib: float) -> Path:
    """Write a checkpoint of random numbers, shard by shard, with the names that files have."""
    from transformers import AutoModelForCausalLM

    config = configuration(kind, gib)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    path.mkdir()
    config.save_pretrained(path)
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stem = name.rpartition(".mlp.experts.")[0] + ".block_sparse_moe.experts"
            experts, rows, columns = tensor.shape
            for expert in range(experts):
                if "gate_up" in name:
                    shapes |= {
                        f"{stem}.{expert}.w{n}.weight": torch.Size([rows // 2, columns]) for n in (1, 3)
                    }
                else:
                    shapes[f"{stem}.{expert}.w2.weight"] = torch.Size([rows, columns])
        else:
            shapes[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if kind == "mixtral" else name] = (
                tensor.shape
            )
    names = list(shapes)
    count = max(1, round(gib))
    each = -(-len(names) // count)
    index: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * each : (number + 1) * each]
        save_file(
            {name: noise(shapes[name]).clone() for name in part}, path / file, metadata={"format": "pt"}
        )
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    os.sync()
    return path


@functools.cache
def noise(shape: torch.Size) -> torch.Tensor:
    """Return small numbers that differ, made quickly, and once for each shape."""
    bits = torch.randint(0, 1 << 15, shape, dtype=torch.int16) & 0x3BFF
    return bits.view(torch.bfloat16)


def evict(path: Path) -> None:
    """Drop the files from the page cache."""
    for file in path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# One load -----------------------------------------------------------------------------------------


def measured(
    given: argparse.Namespace, path: Path, folder: Path, way: str, *, cold: bool
) -> dict[str, float]:
    """Measure one load in a process of its own; a second engine's while the first lives."""
    socket = tempfile.mkdtemp(dir=folder) + "/run/broker.sock"
    with holder(given, path, folder, socket) if way == "gms second" else nothing():
        if cold:
            evict(path)
        process = started(given, path, folder, way, socket)
        return told_by(process)


@contextmanager
def holder(given: argparse.Namespace, path: Path, folder: Path, socket: str) -> Iterator[None]:
    """Keep a first engine alive."""
    process = started(given, path, folder, "gms first", socket, "--hold")
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate()


@contextmanager
def nothing() -> Iterator[None]:
    """Hold nothing."""
    yield


def started(
    given: argparse.Namespace, path: Path, folder: Path, way: str, socket: str, *more: str
) -> subprocess.Popen[str]:
    """Start the process of one load."""
    command = [sys.executable, __file__, "--one", way, socket, "--path", str(path), "--dir", str(folder)]
    command += ["--device", given.device, *(["--dtype", given.dtype] if given.dtype else []), *more]
    command += ["--touch"] if given.touch else []
    environ = {**os.environ, "WEIGHTS_BLOCK": WAYS[way], "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )


def told_by(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return what a process measured."""
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def one(given: argparse.Namespace, way: str, socket: str) -> None:
    """Load once, and print what it took."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tiny = given.dir / "tiny"
    loaded("from_pretrained", tiny, given, socket)
    loaded("tiny", tiny, given, socket, "parallel_shards" if "parallel_shards" in way else "disk")
    if given.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if given.touch:
        touched(free() * 9 // 10).close()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    with DevicePeak(given.device) as device:
        begin = time.perf_counter()
        kept = loaded(way, given.path, given, socket)
        done = time.perf_counter()
        model = getattr(kept, "model", kept) if way != "from_pretrained" else kept
        touch(model)
        end = time.perf_counter()
    size = sum(p.nbytes for p in model.parameters())
    host = status("VmHWM") - before - (size if given.device == "cpu" else 0)
    told = {"loaded": done - begin, "usable": end - begin, "host": max(0, host), "device": device.peak}
    print(json.dumps(told), flush=True)
    if given.hold:
        sys.stdin.read()


def loaded(way: str, path: Path, given: argparse.Namespace, socket: str, format: str = "auto") -> Any:
    """Load a model in one of the ways; a tiny one only by the format that is named."""
    from transformers import AutoModelForCausalLM

    from weights_transformers import load

    more: dict[str, Any] = {} if given.device == "cpu" else {"device_map": given.device}
    if given.dtype:
        more["dtype"] = given.dtype
    if way == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(path, **more)
    else:
        is_shared = way.startswith("gms")
        config = {"gms": {"socket_path": socket}} if is_shared else None
        model = load(AutoModelForCausalLM, path, format="gms" if is_shared else format, config=config, **more)
    if given.device != "cpu":
        torch.cuda.synchronize()
    return model


def touch(model: Any) -> None:
    """Touch every page once."""
    for parameter in model.parameters():
        parameter.detach().reshape(-1).view(torch.uint8)[::4096].max().item()


def touched(size: int) -> mmap.mmap:
    """Return memory that has been touched."""
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
    return memory


def free() -> int:
    """Return how many bytes of memory nobody uses, not for files either."""
    return figure("/proc/meminfo", "MemFree")


def figure(path: str, key: str) -> int:
    """Return a figure of memory that the kernel tells, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def status(key: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    return figure("/proc/self/status", key)


class DevicePeak:
    """The most memory of a device that was in use, above that at the start, whoever allocated it."""

    def __init__(self, device: str) -> None:
        self.peak = 0
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DevicePeak:
        """Begin to look."""
        if self._device != "cpu":
            self._free = torch.cuda.mem_get_info()[0]
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look once more, and end."""
        self._stop.set()
        if self._device != "cpu":
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._free - torch.cuda.mem_get_info()[0])
            if self._stop.wait(0.005):
                return


if __name__ == "__main__":
    main()
