# SPDX-License-Identifier: Apache-2.0
"""What sharing costs and saves on a GPU: a Llama of 16 GB, one writer, two readers.

    python benchmarks/sharing_gpu.py [--layers 32]

The bars: a reader is ready within 50 ms of calling `load()`, its process (so what it imports), its CUDA
context and the digest not counted but reported; it takes at most 64 MiB of the device beyond its context;
its logits equal the writer's; the writer's load takes at most 1.05 times the same load without gms, and
its device peak is at most the model and one arena; the memory returns with the last lease. Files come
from the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as torch's users write it

import weights_core as w
from weights_core.arena import SEGMENT
from weights_core.checkpoint import find
from weights_core.digest import content_digest

WIDTH, HIDDEN, VOCABULARY, HEADS, KV = 4096, 14336, 128256, 32, 8
MIB = 1 << 20
ROUNDS, LATER = 4, 3


def linear(rows: int, columns: int) -> nn.Linear:
    """Return a layer of the model."""
    return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)


class Layer(nn.Module):
    """Attention and a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.q, self.o = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.k, self.v = linear(KV * head, WIDTH), linear(KV * head, WIDTH)
        self.gate, self.up, self.down = linear(HIDDEN, WIDTH), linear(HIDDEN, WIDTH), linear(WIDTH, HIDDEN)
        self.norm1 = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))
        self.norm2 = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute; x: (tokens, WIDTH)."""
        normed = F.rms_norm(x, (WIDTH,), self.norm1)
        q, k, v = (
            part(normed).view(len(x), heads, -1).transpose(0, 1)[None]
            for part, heads in ((self.q, HEADS), (self.k, KV), (self.v, KV))
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(seen[0].transpose(0, 1).reshape(len(x), WIDTH))
        normed = F.rms_norm(x, (WIDTH,), self.norm2)
        out: torch.Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out


class Llama(nn.Module):
    """Llama 3 8B without positions, with as many layers as asked for."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = linear(VOCABULARY, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits; tokens: (tokens,)."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def meta(layers: int) -> Llama:
    """Return the model without memory."""
    with torch.device("meta"):
        return Llama(layers)


@torch.no_grad()
def answer(model: nn.Module) -> str:
    """Return a digest of the logits of a few tokens, exact to the bit."""
    logits = model(torch.arange(5, 69, device="cuda"))
    return str(int(logits.view(torch.int16).to(torch.int64).mul(logits.numel() + 1).sum()))


def write(folder: Path, layers: int) -> int:
    """Write the checkpoint in files of four layers; return its bytes."""
    generator = torch.Generator("cuda").manual_seed(0)
    part: dict[str, torch.Tensor] = {}
    total, number = 0, 0
    for name, wanted in meta(layers).state_dict().items():
        made = torch.randn(wanted.shape, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.02
        part[name] = made.cpu()
        total += made.nbytes
        if sum(tensor.nbytes for tensor in part.values()) > 2 << 30 or name == "head.weight":
            number += 1
            save_file(part, folder / f"model-{number:05d}.safetensors")
            part = {}
    torch.cuda.empty_cache()
    return total


def free() -> int:
    """Return the bytes that the device has left."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


class Lowest:
    """Watches how little of the device is left."""

    def __enter__(self) -> Lowest:
        self.left = torch.cuda.mem_get_info()[0]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.left = min(self.left, torch.cuda.mem_get_info()[0])

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def load(layers: int, path: Path, where: str, formats: list[str]) -> tuple[float, Llama, w.LoadReport]:
    """Load into a model on meta; return the seconds until its last byte is on the device."""
    model = meta(layers)
    start = time.perf_counter()
    report = w.load(w.TorchEngine(model, device="cuda"), path, formats, {"gms": {"socket_path": where}})
    torch.cuda.synchronize()
    return time.perf_counter() - start, model, report


def read(path: Path, where: str, layers: int) -> None:
    """Be a reader: attach, answer, say what it took, wait to be told to end."""
    begun = time.perf_counter()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    context = time.perf_counter() - begun
    begun = time.perf_counter()
    digest = content_digest(find(path))
    known = time.perf_counter() - begun
    before = free()
    first, model, report = load(layers, path, where, ["gms"])
    used = before - free()
    seconds = first
    for _ in range(LATER):  # by a process that has loaded before
        report.lease.close()
        seconds, model, report = load(layers, path, where, ["gms"])
    told = {
        "first": first * 1e3,
        "ms": seconds * 1e3,
        "phases": {phase.name: round(phase.seconds * 1e3, 1) for phase in report.phases},
        "MiB": used / MIB,
        "context": context,
        "digest": known,
        "hashed": digest.bytes_hashed,
        "answer": answer(model),
        "notes": list(report.notes),
    }
    print(json.dumps(told), flush=True)
    sys.stdin.read()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--reader", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.reader:
        read(Path(given.reader[0]), given.reader[1], given.layers)
        return
    with tempfile.TemporaryDirectory(dir=given.dir) as name:
        folder = Path(name) / "ckpt"
        folder.mkdir()
        size = write(folder, given.layers)
        files = len(list(folder.iterdir()))
        print(f"{torch.cuda.get_device_name()}, a model of {size / 1e9:.1f} GB in {files} files")
        measure(folder, f"{name}/run/broker.sock", given.layers, size)


def measure(path: Path, where: str, layers: int, size: int) -> None:
    """Load without gms and with it in turn, then start readers."""
    begun = time.perf_counter()
    content_digest(find(path))
    print(f"digest, the first time: {time.perf_counter() - begun:.1f} s")
    plain, wrote = list[float](), list[float]()
    for turn in range(ROUNDS):
        for formats, taken in ((["parallel_shards"], plain), (["gms", "parallel_shards"], wrote)):
            before = free()
            with Lowest() as lowest:
                seconds, model, report = load(layers, path, where, formats)
            if turn:  # the first load of each kind makes what later ones find
                taken.append(seconds)
            if turn == ROUNDS - 1:
                spent = ", ".join(
                    f"{p.name} {p.seconds * 1e3:.0f}" for p in report.phases if p.seconds > 5e-4
                )
                print(
                    f"{'+'.join(formats)}: peak {(before - lowest.left) / MIB:.0f} MiB; by phase, ms: {spent}"
                )
            report.lease.close()
            del model, report
    ratio = statistics.median(wrote) / statistics.median(plain)
    print(f"without gms {statistics.median(plain):.3f} s, {size / statistics.median(plain) / 1e9:.1f} GB/s")
    print(f"a writer's  {statistics.median(wrote):.3f} s, {ratio:.3f} of it (bar 1.05)")
    print(f"model {size / MIB:.0f} MiB, an arena at most {SEGMENT / MIB:.0f} MiB")
    empty = free()
    _, model, report = load(layers, path, where, ["gms", "parallel_shards"])
    wanted = answer(model)
    command = [sys.executable, __file__, "--layers", str(layers), "--reader", str(path), where]
    readers = []
    for _ in range(2):
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        readers.append(process)
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        print(
            f"reader: load() {told['ms']:.1f} ms (bar 50; {told['first']:.1f} the first time in a process, "
            f"which imports), {told['MiB']:.1f} MiB of the device (bar 64), "
            f"logits {'equal' if told['answer'] == wanted else 'DIFFER'}; its process "
            f"{time.perf_counter() - begun:.1f} s in all, of which context {told['context']:.2f} s, digest "
            f"{told['digest'] * 1e3:.1f} ms ({told['hashed']} bytes hashed)"
        )
        print(f"  by phase, ms: {told['phases']}")
    report.lease.close()
    del model, report
    print(f"the writer has gone, readers hold {(empty - free()) / MIB:.0f} MiB")
    for process in readers:
        process.communicate()
    time.sleep(0.5)
    print(f"all have gone: {(empty - free()) / MIB:.0f} MiB more than before")


if __name__ == "__main__":
    main()
