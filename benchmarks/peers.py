# SPDX-License-Identifier: Apache-2.0
"""What a pull from a peer costs: against a plain copy of the same bytes, and against NIXL.

On the host, with 2 GiB in 1,000 tensors: the transfer alone is at least 0.8 of a memcpy into the same
memory, which has been touched before, and at least 2 times NIXL. Two processes, 9 GiB of memory.

With --cuda, for two GPUs: a rank's shard of --gib in the mix of a Llama of 70 B and in that of a model
with many small experts. The transfer alone is at least 0.9 of a raw copy between the devices; NIXL at
least 0.95 of its own rate for one buffer. Also: the whole load, and what verification costs.

    python benchmarks/peers.py
    python benchmarks/peers.py --cuda --gib 40
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import weights_core as w
from weights_core.engine import Alloc
from weights_core.types import Applied, EngineInfo, TensorMeta
from weights_presharded.peer.copying import Copy, Pool
from weights_presharded.peer.places import threads_of
from weights_presharded.peer.target import Target
from weights_presharded.plugin import PreshardedConfig

DIGEST = "xxh3_128:" + "0" * 32
MIB = 1 << 20
RUNS = 7


def even(total: int) -> list[int]:
    """Return 1,000 tensors of one size."""
    return [total // 1000 // 256 * 256] * 1000


def llama(total: int) -> list[int]:
    """Return a rank's tensors in the mix of a Llama of 70 B, cut for four, layers repeated to `total`."""
    layer = [10 * MIB * 2, 16 * MIB * 2, 112 * MIB * 2, 56 * MIB * 2, 16384, 16384]
    sizes = [501 * MIB, 501 * MIB]
    while sum(sizes) + sum(layer) <= total:
        sizes += layer
    return sizes


def experts(total: int) -> list[int]:
    """Return the mix of a model with many small experts: 0.4 to 3 MB each, scales and biases between."""
    layer = [12 * MIB, 4096, 2 * MIB, *[size for _ in range(128) for size in (3 * MIB, 1536 * 1024, 4096)]]
    sizes = [501 * MIB, 501 * MIB]
    while sum(sizes) + sum(layer) <= total:
        sizes += layer
    return sizes


MIXES: Mapping[str, Callable[[int], list[int]]] = {"even": even, "llama": llama, "experts": experts}


class Flat(w.Engine):
    """An engine of flat tensors: with memory that has been touched, or with none until it binds."""

    def __init__(self, sizes: list[int], device: str, *, fill: bool, meta: bool) -> None:
        self._device = device
        self._metas = {f"t{i}": TensorMeta(f"t{i}", (size,), "U8", size) for i, size in enumerate(sizes)}
        where = "meta" if meta else device
        self.params = {
            n: torch.zeros(m.nbytes, dtype=torch.uint8, device=where) for n, m in self._metas.items()
        }
        if fill:
            for index, tensor in enumerate(self.params.values()):
                tensor.random_(0, 256) if index < 64 else tensor.fill_(index % 251)

    @property
    def info(self) -> EngineInfo:
        """An engine whose post-load does nothing."""
        return EngineInfo(
            name="flat",
            version="1",
            device=self._device,
            accepts={w.Layout.SHARDED},
            shareable={w.Layout.SHARDED: "nothing is done to it"},
        )

    def expected(self, layout: w.Layout) -> Mapping[str, TensorMeta]:
        """Return the tensors."""
        del layout
        return self._metas

    def apply(self, weights: w.WeightSet) -> Applied:
        """Take nothing: there is no checkpoint here."""
        raise NotImplementedError

    def bind(self, weights: w.WeightSet) -> Applied:
        """Take what came."""
        self.params = {name: weights[name] for name in self._metas}
        return Applied(written=self._metas.keys(), unused=())

    def materialize(self, alloc: Alloc) -> int:
        """Take memory."""
        self.params = {name: alloc(meta) for name, meta in self._metas.items()}
        return sum(meta.nbytes for meta in self._metas.values())

    def tensors(self, layout: w.Layout) -> Mapping[str, torch.Tensor]:
        """Return the tensors."""
        del layout
        return self.params


def settings(folder: str, **more: object) -> dict[str, Any]:
    """Return the settings of both sides."""
    return {"registry": f"{folder}/peers", "digest": DIGEST, "beat": 1.0, **more}


def serve(given: argparse.Namespace) -> None:
    """Be the source, until standard input ends."""
    from weights_presharded.peer.gates import Serving
    from weights_presharded.peer.source import publish

    sizes = MIXES[given.mix](int(given.gib * (1 << 30)))
    engine = Flat(sizes, given.device, fill=True, meta=False)
    config = PreshardedConfig(**settings(given.serve, transport=given.transport))
    request = w.LoadRequest(checkpoint=given.serve, engine=engine.info)
    started = time.perf_counter()
    receipt = publish(config, request, engine, Serving(w.Layout.SHARDED, "live"), None, was_target=False)
    seconds = time.perf_counter() - started
    while any("settling" in thread.name for thread in threading.enumerate()):
        time.sleep(0.1)
    settled = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "settled": settled, "bytes": receipt.nbytes}), flush=True)
    sys.stdin.read()
    assert receipt.close is not None
    receipt.close()


@contextlib.contextmanager
def source(folder: str, mix: str, gib: float, device: str, transport: str) -> Iterator[dict[str, Any]]:
    """Have another process serve."""
    command = [sys.executable, __file__, "--serve", folder, "--mix", mix, "--gib", str(gib)]
    command += ["--device", device, "--transport", transport]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), "")  # others print, too
        assert line, "the source has failed"
        yield json.loads(line)
    finally:
        process.communicate()
        print(f"  the source ended with {process.returncode}")


def pull(engine: Flat, folder: str, **more: object) -> tuple[float, float, int]:
    """Pull; return the seconds of all, of the transfer alone, and the bytes."""
    config = PreshardedConfig(**settings(folder, **more))
    request = w.LoadRequest(checkpoint=folder, engine=engine.info)
    started = time.perf_counter()
    found = Target(config, request, engine, serves_on=False).pull()
    whole = time.perf_counter() - started
    found.close()
    return whole, found.seconds, found.bytes_read


def on_host(gib: float) -> None:
    """Compare on the host."""
    sizes = even(int(gib * (1 << 30)))
    total = sum(sizes)
    print(f"host: {total / 2**30:.2f} GiB in {len(sizes)} tensors, {len(os.sched_getaffinity(0))} cores")
    engine = Flat(sizes, "cpu", fill=False, meta=False)
    before = Flat(sizes, "cpu", fill=True, meta=False)
    copies = [
        Copy(one.data_ptr(), other.data_ptr(), one.numel())
        for one, other in zip(before.params.values(), engine.params.values(), strict=True)
    ]
    results: dict[str, list[float]] = {
        "memcpy, one thread": [],
        "memcpy, all": [],
        "local": [],
        "verified": [],
    }
    results |= {"whole load": [], "nixl": []}
    threads, received = threads_of(PreshardedConfig()), 0
    with tempfile.TemporaryDirectory() as folder:
        with source(folder, "even", gib, "cpu", "auto") as told:
            print(f"  offered after {told['seconds']:.2f} s, in huge pages after {told['settled']:.2f} s")
            for _ in range(RUNS):
                results["memcpy, one thread"].append(timed(lambda: Pool(1).copy(copies, lambda: None)))
                results["memcpy, all"].append(timed(lambda: Pool(threads).copy(copies, lambda: None)))
                _, alone, received = pull(engine, folder, verify=False)
                results["local"].append(alone)
                whole, alone, _ = pull(engine, folder)
                results["verified"].append(alone)
                results["whole load"].append(whole)
        print(f"  bytes received: {received / total:.4f} of the rank's own")
    with tempfile.TemporaryDirectory() as folder, source(folder, "even", gib, "cpu", "nixl"):
        for _ in range(RUNS):
            results["nixl"].append(pull(engine, folder, transport="nixl", verify=False)[1])
    rates = {name: total / statistics.median(spent) / 1e9 for name, spent in results.items()}
    for name, rate in rates.items():
        print(f"  {name:<20}{rate:8.2f} GB/s")
    best = max(rates["memcpy, one thread"], rates["memcpy, all"])
    print(f"local / memcpy {rates['local'] / best:.2f} (bar 0.8)")
    print(f"local / nixl {rates['local'] / rates['nixl']:.2f} (bar 2)")
    print(f"verification: {rates['local'] / rates['verified'] - 1:+.0%} of the transfer's time")


def timed(step: Callable[[], object]) -> float:
    """Return the seconds that `step` takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def on_devices(gib: float) -> None:
    """Compare between two devices, in one process each."""
    single = one_buffer(int(gib * (1 << 30)))
    print(f"nixl, one buffer of {gib:g} GiB: {single:.1f} GB/s")
    for mix in ("llama", "experts"):
        sizes = MIXES[mix](int(gib * (1 << 30)))
        total = sum(sizes)
        print(f"{mix}: {total / 2**30:.1f} GiB in {len(sizes):,} tensors, cuda:0 to cuda:1")
        raw = raw_copy(min(total, 8 << 30))
        print(f"  raw copy between the devices {raw:8.1f} GB/s")
        rates = {}
        for name, transport in (("local", "auto"), ("nixl", "nixl")):
            with (
                tempfile.TemporaryDirectory() as folder,
                source(folder, mix, gib, "cuda:0", transport) as told,
            ):
                print(f"  {name}: the source offered it in {told['seconds']:.2f} s")
                for verify in (False, True):
                    received = 0
                    spent, whole = [], []
                    for _ in range(RUNS):
                        engine = Flat(sizes, "cuda:1", fill=False, meta=True)
                        all_of_it, alone, received = pull(engine, folder, transport=transport, verify=verify)
                        spent.append(alone)
                        whole.append(all_of_it)
                        del engine
                        torch.cuda.empty_cache()
                    rates[name, verify] = total / statistics.median(spent) / 1e9
                    told_as = "verified" if verify else "transfer alone"
                    print(
                        f"  {name}, {told_as:<15}{rates[name, verify]:8.1f} GB/s; from asking to ready "
                        f"{statistics.median(whole):.3f} s; received {received / total:.4f}; each transfer "
                        f"{', '.join(f'{total / one / 1e9:.0f}' for one in spent)}"
                    )
        print(
            f"{mix}: local / raw {rates['local', False] / raw:.3f} (bar 0.9), nixl / its one buffer "
            f"{rates['nixl', False] / single:.3f} (bar 0.95), verification costs "
            f"{rates['local', False] / rates['local', True] - 1:.1%} (bar 10 %)"
        )


def one_buffer(nbytes: int) -> float:
    """Return GB/s of NIXL for one tensor."""
    gib = nbytes / (1 << 30)
    with tempfile.TemporaryDirectory() as folder, source(folder, "one", gib, "cuda:0", "nixl"):
        spent = []
        for _ in range(RUNS):
            engine = Flat(one(nbytes), "cuda:1", fill=False, meta=True)
            spent.append(pull(engine, folder, transport="nixl", verify=False)[1])
            del engine
            torch.cuda.empty_cache()
    return nbytes / statistics.median(spent) / 1e9


def one(total: int) -> list[int]:
    """Return one tensor."""
    return [total]


def raw_copy(nbytes: int) -> float:
    """Return GB/s of one copy from a device to the other, in one process."""
    a = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0").zero_()
    b = torch.empty(nbytes, dtype=torch.uint8, device="cuda:1").zero_()
    spent = []
    for _ in range(5):
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        start = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize(1)
        torch.cuda.synchronize(0)
        spent.append(time.perf_counter() - start)
    del a, b
    torch.cuda.empty_cache()
    return nbytes / min(spent) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", action="store_true", help="between two GPUs")
    parser.add_argument("--gib", type=float, default=None, help="size of a rank's shard")
    for hidden in ("--serve", "--mix", "--device", "--transport"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given)
    elif given.cuda:
        on_devices(given.gib or 40.0)
    else:
        on_host(given.gib or 2.0)


MIXES = {**MIXES, "one": one}

if __name__ == "__main__":
    main()
