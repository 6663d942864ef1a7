# SPDX-License-Identifier: Apache-2.0
"""Draw one checkpoint loaded in the seed's way and in ours, from the disk: the picture of the README.

    python benchmarks/charts.py docs/loading.png [--gib 4] [--folder /on/the/disk]

The seed is the loader of TensorRT-LLM's pull request 14021: files in a thread pool with the safetensors
library, a dict of all tensors, and then the engine. It takes part as a plugin, so both are reported alike.
Each load is a process of its own, with no page of the checkpoint in the cache.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from matplotlib.figure import Figure
from reading import GIB, evict, llama, write
from reading import Checkpoint as Written
from safetensors.torch import load_file
from torch import nn

import weights_core as w
from weights_core import chart
from weights_core.checkpoint import find
from weights_core.shards import open_shards
from weights_core.testing import host_of
from weights_core.weightset import Slices

THREADS = 8


class SeedSet(w.WeightSet):
    """A dict of all tensors."""

    provider = "seed"
    layout = w.Layout.CHECKPOINT

    def __init__(self, tensors: dict[str, torch.Tensor], metas: Mapping[str, w.TensorMeta]) -> None:
        self._tensors, self._metas = tensors, metas

    @property
    def metas(self) -> Mapping[str, w.TensorMeta]:
        """Those of the files."""
        return self._metas

    @property
    def bytes_read(self) -> int:
        """All of them."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, name: str, slices: Slices | None = None) -> torch.Tensor:
        """Return what is there."""
        tensor = self._tensors[name]
        return tensor[slices] if slices else tensor


class Seed:
    """The seed as a source."""

    weights_api = 1

    @w.hookimpl
    def resolve_format(self, request: w.LoadRequest) -> w.FormatClaim:
        """Claim every checkpoint."""
        return w.FormatClaim(roles={w.Role.SOURCE}, reason="reads whole files in a thread pool")

    @w.hookimpl
    def load_weights(self, request: w.LoadRequest, engine: w.Engine, source: w.Source) -> w.WeightSet:
        """Read all files into memory of their own."""
        shards = open_shards(find(request.checkpoint))
        metas = {name: meta for shard in shards for name, meta in shard.metas.items()}

        def one(path: Path) -> dict[str, torch.Tensor]:
            return {name: tensor.clone() for name, tensor in load_file(path).items()}

        tensors: dict[str, torch.Tensor] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for part in pool.map(one, [shard.path for shard in shards]):
                tensors |= part
        for shard in shards:
            shard.close()
        return SeedSet(tensors, metas)


def load(way: str, folder: Path, out: Path) -> None:
    """Load once, and keep the report."""
    with torch.device("meta"):
        shapes = {
            name: meta.shape for shard in open_shards(find(folder)) for name, meta in shard.metas.items()
        }
        model = nn.Module()
        for name, shape in shapes.items():
            module = model
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)))
    engine = w.TorchEngine(model)
    if way == "seed":
        report = w.load(engine, folder, "seed", host=host_of(seed=Seed))
    else:
        report = w.load(engine, folder)
    report.lease.close()
    out.write_bytes(pickle.dumps(report))


def main() -> None:
    """Load both ways and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        load(given.way[0], Path(given.way[1]), given.picture)
        return
    reports = []
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="weights-charts-") as name:
        written: Written = write(Path(name) / "llama", llama(int(given.gib * GIB)), 8, pickled=False)
        for way in ("seed", "ours"):
            evict(written)
            kept = Path(name) / "report"
            command = [sys.executable, __file__, str(kept), "--way", way, str(written.folder)]
            subprocess.run(command, check=True)
            reports.append(pickle.loads(kept.read_bytes()))
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, report in zip(figure.subplots(1, 2, sharex=True, sharey=True), reports, strict=True):
        chart.plot(axes, report)
        over = report.peak_over_model / 2**20
        print(f"{report.provider}: {report.seconds:.2f} s, {over:.0f} MiB over the model")
    figure.savefig(given.picture, dpi=90)


if __name__ == "__main__":
    main()
