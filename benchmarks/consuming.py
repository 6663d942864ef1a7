# SPDX-License-Identifier: Apache-2.0
"""What consuming costs and what it frees.

First, seconds to consume 93,696 names (61 layers × 256 experts × 3 projections × weight and scale) by
prefix, beside a scan of all names per prefix and a plain sorted list with bisection. Then resident
memory while a checkpoint is consumed module by module, beside dicts of the safetensors library, each
in a process of its own. Bars: 0.5 s in all; peak at most 1.1 × the largest module plus the window.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from weights_consumable.weights import ConsumableWeights
from weights_core import TensorMeta, WeightSet
from weights_core.checkpoint import find
from weights_core.disk import ShardSet
from weights_core.meter import rss
from weights_core.shards import open_shards
from weights_core.testing import random_tensor, write_checkpoint
from weights_core.weightset import Slices

LAYERS, EXPERTS = 61, 256
RUNS = 5
MODULES = 12
MIX = {  # name of a tensor of a module → dtype and shape
    "bf16": {f"{p}.weight": ("BF16", (2048, 4096)) for p in "qkv"},
    "fp8 and scales": {
        f"experts.{e}.{kind}": ("F8_E4M3", (256, 512)) if kind == "weight" else ("F32", (2, 4))
        for e in range(256)
        for kind in ("weight", "scale")
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(memory_of(WAYS[arguments.way], arguments.checkpoint)))
        return
    if not arguments.memory:
        print_keys()
    print_memory()


# Names ------------------------------------------------------------------------------------------


class Names(WeightSet):
    """A set that only names tensors."""

    def __init__(self, names: list[str]) -> None:
        self._metas = {name: TensorMeta(name, (1,), "F32", 4) for name in names}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """All of one shape."""
        return self._metas

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return a zero."""
        return torch.zeros(1)


def print_keys() -> None:
    """Print seconds per way and grain."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.{kind}"
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for p in ("gate", "up", "down")
        for kind in ("weight", "weight_scale_inv")
    ]
    grains = {
        "layer": [f"model.layers.{layer}" for layer in range(LAYERS)],
        "expert": [f"model.layers.{n}.mlp.experts.{e}" for n in range(LAYERS) for e in range(EXPERTS)],
        "linear": [name.rpartition(".")[0] for name in names[::2]],
    }
    print(f"{len(names):,} names consumed by prefix, seconds, median of {RUNS} (scan: of 1, scaled):")
    print(f"  {'module':<8} {'calls':>7} {'consumable':>11} {'bisect':>8} {'scan':>9}")
    for grain, prefixes in grains.items():
        ours: list[float] = []
        peer: list[float] = []
        for _ in range(RUNS):
            ours.append(seconds(ConsumableWeights(Names(names)).mark_consumed, prefixes))
            peer.append(seconds(bisecting(names), prefixes))
        few = prefixes[:50]
        scan = seconds(scanning(names), few) * len(prefixes) / len(few)
        print(
            f"  {grain:<8} {len(prefixes):7,} {statistics.median(ours):11.3f} "
            f"{statistics.median(peer):8.3f} {scan:9.1f}"
        )


def seconds(consume: Callable[[str], int], prefixes: list[str]) -> float:
    """Return the seconds that consuming every prefix takes."""
    began = time.perf_counter()
    for prefix in prefixes:
        consume(prefix)
    return time.perf_counter() - began


def bisecting(names: list[str]) -> Callable[[str], int]:
    """Return a consumer over a dict and a sorted list."""
    left = dict.fromkeys(names)
    index: list[str] = []

    def consume(prefix: str) -> int:
        if not index:
            index.extend(sorted(left))
        begin, end = bisect_left(index, prefix + "."), bisect_left(index, prefix + "/")
        gone = [name for name in index[begin:end] if name in left]
        for name in gone:
            del left[name]
        return len(gone)

    return consume


def scanning(names: list[str]) -> Callable[[str], int]:
    """Return a consumer that looks at every name."""
    left = dict.fromkeys(names)

    def consume(prefix: str) -> int:
        gone = [name for name in left if name.startswith(prefix + ".")]
        for name in gone:
            del left[name]
        return len(gone)

    return consume


# Memory -----------------------------------------------------------------------------------------


def print_memory() -> None:
    """Print the peak over the largest module, and what is left after each third of the modules."""
    print(f"\nResident memory over the start, MiB, as {MODULES} modules are read, copied from and consumed:")
    print(f"  {'weights':<15} {'way':<28} {'module':>7} {'peak':>7} {'ratio':>6}   after 1/3, 2/3, all")
    for mix, module in MIX.items():
        with tempfile.TemporaryDirectory() as folder:
            tensors = {
                f"layers.{n:02}.{name}": random_tensor(*shape, dtype=dtype)
                for n in range(MODULES)
                for name, (dtype, shape) in module.items()
            }
            size = sum(t.numel() * t.element_size() for t in tensors.values()) / MODULES
            path = write_checkpoint(Path(folder) / "c", tensors)
            del tensors
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--checkpoint", str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, after = json.loads(done.stdout)
                thirds = [after[len(after) * k // 3 - 1] for k in (1, 2, 3)]
                print(
                    f"  {mix:<15} {way:<28} {size / 2**20:7.1f} {peak / 2**20:7.1f} {peak / size:6.2f}   "
                    + ", ".join(f"{value / 2**20:.1f}" for value in thirds)
                )


def memory_of(way: Callable[[Path], Iterator[None]], path: Path) -> tuple[int, list[int]]:
    """Return the exact peak and the level after each module, above that before the first."""
    use([torch.zeros(1 << 20, dtype=torch.uint8)])
    steps = way(path)
    next(steps)
    Path("/proc/self/clear_refs").write_text("5")
    start = rss()
    after = [rss() - start for _ in steps]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - start, after


def use(tensors: Iterable[torch.Tensor]) -> None:
    """Touch every byte, as an engine that copies does."""
    for tensor in tensors:
        tensor.view(torch.uint8).max()


def disk_set(path: Path) -> WeightSet:
    """Open the checkpoint plainly."""
    return ShardSet(open_shards(find(path)), provider="disk")


def by_name(path: Path) -> Iterator[None]:
    """Once opened: a module's dict is read whole, then the module is marked."""
    weights = ConsumableWeights(disk_set(path))
    yield
    for n in range(MODULES):
        module = dict(weights.filter_prefix(f"layers.{n:02}").items())
        use(module.values())
        module.clear()
        weights.mark_consumed(f"layers.{n:02}")
        yield


def streamed(path: Path) -> Iterator[None]:
    """Tensors are gathered until a module is whole, then it is marked."""
    weights = ConsumableWeights(disk_set(path))
    due = {f"layers.{n:02}": len(weights.names_under(f"layers.{n:02}")) for n in range(MODULES)}
    gathered: dict[str, list[torch.Tensor]] = {}
    yield
    for name, tensor in weights.stream():
        prefix = ".".join(name.split(".")[:2])
        gathered.setdefault(prefix, []).append(tensor)
        del tensor
        if len(gathered[prefix]) == due[prefix]:
            use(gathered.pop(prefix))
            weights.mark_consumed(prefix)
            yield


def mapped(path: Path) -> Iterator[None]:
    """The seed's way: `load_file` of every shard into one dict, entries deleted."""
    yield
    weights = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    yield from deleting(weights)


def opened(path: Path) -> Iterator[None]:
    """A dict by `safe_open`, entries deleted."""
    weights = {}
    yield
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            weights.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    yield from deleting(weights)


def deleting(weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Use and delete module by module."""
    for n in range(MODULES):
        for name in [name for name in weights if name.startswith(f"layers.{n:02}.")]:
            use([weights.pop(name)])
        yield


WAYS: dict[str, Callable[[Path], Iterator[None]]] = {
    "consumable, by name": by_name,
    "consumable, stream": streamed,
    "load_file, del": mapped,
    "safe_open, del": opened,
}

if __name__ == "__main__":
    main()
