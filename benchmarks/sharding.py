# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint is cut for ranks, in how much memory, beside copying its files.

    python benchmarks/sharding.py [--gib 8] [--tp 4] [--rounds 3] [--folder DIR]

Converting and copying take turns, each in a process of its own, from the same files, which are in the
page cache if they fit; both sync what they wrote before they end. The ratio is the copy's time over the
converter's. Memory is the converter's resident peak, less what its interpreter had with every module
imported; what the system has cached of files meanwhile is told beside it. Then each rank is loaded with
and without verification. The folder needs three times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
SHARD = 4 * GIB

PLAN = """
schema = "weights.plan/1"

[[rule]]
as = "layers.*.qkv"
cut = 0
fuse = [
    { match = "model.layers.*.q_proj.weight" },
    { match = "model.layers.*.k_proj.weight" },
    { match = "model.layers.*.v_proj.weight" },
]

[[rule]]
as = "layers.*.gate_up"
cut = 0
fuse = [{ match = "model.layers.*.gate_proj.weight" }, { match = "model.layers.*.up_proj.weight" }]

[[rule]]
match = "model.layers.*.o_proj.weight"
cut = 1

[[rule]]
match = "model.layers.*.down_proj.weight"
cut = 1

[[rule]]
match = "model.embed_tokens.weight"
cut = 0

[[rule]]
match = "**"
"""


def shapes(size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a bf16 Llama of about `size` bytes, layers of 436 MB."""
    yield "model.embed_tokens.weight", (32768, 4096)
    left = size - 2 * 32768 * 4096
    layer = {
        "input_layernorm": (4096,),
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
        "v_proj": (1024, 4096),
        "o_proj": (4096, 4096),
        "gate_proj": (14336, 4096),
        "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    }
    due = sum(2 * rows * (rest[0] if rest else 1) for rows, *rest in layer.values())
    for number in range(max(1, left // due)):
        for name, shape in layer.items():
            yield f"model.layers.{number}.{name}.weight", shape


def write(folder: Path, size: int) -> int:
    """Write the checkpoint in shards, of random bytes; return how many."""
    folder.mkdir(parents=True)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, shape in shapes(size):
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if filled and filled + nbytes > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += nbytes
        total += nbytes
    noise = os.urandom(16 * MIB + 4093)
    for number, group in enumerate(groups, 1):
        header: dict[str, object] = {}
        end = 0
        for name, shape in group:
            begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with open(folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors", "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            left = end
            while left:
                left -= out.write(noise[: min(left, len(noise))])
    (folder / "config.json").write_text("{}")
    return total


# What is run in processes of their own -------------------------------------------------------------


def copy(source: Path, out: Path) -> dict[str, Any]:
    """Copy the files, as fast as the standard library can, and sync them."""
    started = time.perf_counter()
    out.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, out / file.name)
        fd = os.open(out / file.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return {"seconds": time.perf_counter() - started}


def convert(source: Path, out: Path, size: int) -> dict[str, Any]:
    """Cut the checkpoint; tell the resident peak above the interpreter's."""
    import torch  # noqa: F401 - a part of the interpreter, as far as memory goes

    from weights_presharded import read_plan, shard

    plan = source.parent / "plan.toml"
    plan.write_text(PLAN)
    rules = read_plan(plan)
    before, cached = _status("VmRSS"), _cached()
    made = shard(source, out, size=size, plan=rules)
    return {
        "seconds": made.seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "cached": _cached() - cached,
        "written": made.nbytes,
    }


def load(out: Path, size: int, verify: bool) -> dict[str, Any]:
    """Fill memory that is there with each rank's tensors."""
    import torch

    from weights_core import EngineInfo, LoadRequest, Target, Topology, dtypes
    from weights_presharded.folder import open_folder

    seconds, nbytes = 0.0, 0
    for rank in range(size):
        info = EngineInfo(name="bench", version="1", topology=Topology.tensor_parallel(size, rank))
        weights = open_folder(LoadRequest(checkpoint=out, engine=info), verify=verify)
        targets = [
            Target(n, torch.zeros(m.torch_shape, dtype=dtypes.to_torch(m.dtype)))
            for n, m in weights.metas.items()
        ]
        started = time.perf_counter()
        for target in weights.fill(targets):
            nbytes += target.out.nbytes
        seconds += time.perf_counter() - started
        weights.close()
    return {"seconds": seconds, "GB/s": nbytes / 1e9 / seconds}


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _cached() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Cached:")).split()[1]) * 1024


# --------------------------------------------------------------------------------------------------


def measured(*arguments: object) -> dict[str, Any]:
    """Run this file again for one step, with no digest of the files kept from before."""
    os.sync()
    command = [sys.executable, __file__, "--step", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"XDG_CACHE_HOME": cache}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step", nargs="*")
    given = parser.parse_args()
    if given.step:
        what, *rest = given.step
        if what == "copy":
            told = copy(Path(rest[0]), Path(rest[1]))
        elif what == "convert":
            told = convert(Path(rest[0]), Path(rest[1]), int(rest[2]))
        else:
            told = load(Path(rest[0]), int(rest[1]), rest[2] == "verify")
        print(json.dumps(told))
        return
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="weights-sharding-") as name:
        _rounds(Path(name), int(given.gib * GIB), given.tp, given.rounds)


def _rounds(folder: Path, size: int, tp: int, rounds: int) -> None:
    source = folder / "source"
    total = write(source, size)
    copies, conversions = [], []
    for number in range(rounds):
        copies.append(measured("copy", source, folder / "copy"))
        shutil.rmtree(folder / "copy")
        conversions.append(measured("convert", source, folder / "cut", tp))
        if number < rounds - 1:
            shutil.rmtree(folder / "cut")
    copied = statistics.median(one["seconds"] for one in copies)
    cut = statistics.median(one["seconds"] for one in conversions)
    peak = max(one["peak"] for one in conversions)
    ratios = ", ".join(f"{a['seconds'] / b['seconds']:.2f}" for a, b in zip(copies, conversions, strict=True))
    print(f"{total / GIB:.2f} GiB for {tp} ranks, {rounds} rounds, medians")
    print(f"copying the files   {copied:7.2f} s  {total / 1e9 / copied:6.2f} GB/s")
    print(f"weights shard       {cut:7.2f} s  {total / 1e9 / cut:6.2f} GB/s")
    print(f"ratio               {copied / cut:7.2f}    (by round: {ratios})")
    print(f"resident peak       {peak / MIB:7.0f} MiB above the interpreter")
    cached = statistics.median(one["cached"] for one in conversions)
    print(f"page cache          {cached / MIB:7.0f} MiB more in the system, given back under pressure")
    for how in ("verify", "no-verify"):
        runs = [measured("load", folder / "cut", tp, how) for _ in range(rounds)]
        rate = statistics.median(one["GB/s"] for one in runs)
        print(f"load, {how:<13} {rate:7.2f} GB/s, all ranks one after the other, from page cache")


if __name__ == "__main__":
    main()
