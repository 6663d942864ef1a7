# SPDX-License-Identifier: Apache-2.0
"""What sharing on the host costs and saves: attach against a warm disk load, pages, and the broker.

The bars: attaching takes at most 1 % of a warm load from disk; a further reader's own pages are at
most 1 % of the model; the broker takes at most 20 MB, starts within 100 ms and serves 1,000 attaches
a second. Needs 2 GiB on the disk of `--dir` and about 8 GiB of memory.
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import weights_core as w
from weights_core.checkpoint import find
from weights_core.config import Settings
from weights_core.digest import content_digest
from weights_core.testing import write_checkpoint
from weights_gms import client

T = TypeVar("T")
TENSORS, WIDTH, ROWS = 300, 1024, 3584  # 2.05 GiB of bf16
RUNS = 7
READERS = 8

ATTACHING = """
import json, sys, time, os
sys.path.append(sys.argv[1])
from weights_core import wire
import socket
end, count = time.monotonic() + 3.0, 0
message = wire.pack({"op": "open", "members": [[sys.argv[3], json.loads(sys.argv[4])]], "rank": 0,
                     "mode": "ro", "replace": "keep", "keep": 0, "timeout": 9, "group": str(os.getpid())})
while time.monotonic() < end:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[2])
        sock.sendall(message)
        inbox = wire.Inbox(wire.MAX_REPLY)
        while (taken := inbox.take()) is None:
            assert inbox.receive(sock)
        assert taken[0]["ok"] == "read", taken
        for fd in taken[1]:
            os.close(fd)
        count += 1
print(count)
"""


def model() -> nn.Module:
    """Return the model on meta."""
    with torch.device("meta"):
        return nn.ParameterList(
            nn.Parameter(torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)) for _ in range(TENSORS)
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--reader", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.reader:
        read(Path(given.reader[0]), given.reader[1])
        return
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        path = checkpoint(Path(folder) / "ckpt")
        settings: Settings = {"gms": {"socket_path": f"{folder}/run/broker.sock"}}
        broker_alone(Path(folder) / "alone" / "broker.sock")
        time.sleep(0.2)  # a digest is kept of files that have settled
        first = content_digest(find(path))
        known, _ = timed(lambda: content_digest(find(path)))
        print(f"digest: first time {first.seconds:.2f} s, known {known * 1e3:.2f} ms")
        compare(path, settings)
        further_readers(path, settings)


def checkpoint(path: Path) -> Path:
    """Write the checkpoint, shard by shard, with random bits that are numbers."""
    torch.manual_seed(0)
    tensors = {str(i): torch.randn(ROWS, WIDTH).bfloat16() for i in range(TENSORS)}
    print(f"{TENSORS} tensors, {sum(t.nbytes for t in tensors.values()) / 2**30:.2f} GiB")
    return write_checkpoint(path, tensors, shards=4)


def compare(path: Path, settings: Settings) -> None:
    """Load from disk and attach, in turn, and compare the time and every bit."""
    into = model()
    wrote, report = timed(lambda: w.load(w.TorchEngine(into), path, "gms", settings))
    print(
        f"writer's load {wrote:.3f} s: " + ", ".join(f"{p.name} {p.seconds:.3f}" for p in report.phases[:4])
    )
    disk, attach, phases = [], [], []
    for run in range(RUNS):
        one, other = w.TorchEngine(model()), w.TorchEngine(model())
        start = time.perf_counter()
        w.load(one, path, "disk")
        middle = time.perf_counter()
        read = w.load(other, path, "gms", settings)
        disk.append(middle - start)
        attach.append(time.perf_counter() - middle)
        phases.append({p.name: p.seconds for p in read.phases})
        if run == 0:
            pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
            print(f"bit-equal to disk: {all(torch.equal(a, b) for a, b in pairs)}")
        read.lease.close()
    alone = statistics.median(attach_alone(w.TorchEngine(model()), path, settings) for _ in range(RUNS))
    base, whole = statistics.median(disk), statistics.median(attach)
    spent = {n: statistics.median(p.get(n, 0.0) for p in phases) * 1e3 for n in phases[0]}
    print(f"warm disk load {base:.3f} s")
    print(f"attach, with every tensor: {alone * 1e3:.1f} ms, {alone / base:.2%} of it (bar 1 %)")
    print(f"a reader's whole load(): {whole * 1e3:.1f} ms, {whole / base:.2%} of it")
    print("by phase, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in spent.items() if ms > 0.05))
    report.lease.close()


def attach_alone(engine: w.Engine, path: Path, settings: Settings) -> float:
    """Return the seconds from asking the broker to every tensor being there, without the rest of a load."""
    with w.open_session(engine, path, "gms", settings) as session:
        session.resolve()
        start = time.perf_counter()
        weights = session.load()
        tensors = dict(weights.stream())
        seconds = time.perf_counter() - start
        assert len(tensors) == TENSORS
        session.apply()
        session.publish(w.Layout.SHARDED)
        session.post_load()
        session.finish().lease.close()
    return seconds


def further_readers(path: Path, settings: Settings) -> None:
    """Start readers that read every byte; say what each has for itself, and what the broker takes."""
    into = model()
    report = w.load(w.TorchEngine(into), path, "gms", settings)
    where = str(settings["gms"]["socket_path"])
    command = [sys.executable, __file__, "--reader", str(path), where]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(READERS)
    ]
    size = sum(p.nbytes for p in into.parameters())
    for reader in readers:
        assert reader.stdout is not None
        reader.stdout.readline()
    own = [private_bytes(reader.pid) for reader in readers]
    print(f"{READERS} readers' own pages of the arenas: at most {max(own) / size:.3%} of the model (bar 1 %)")
    found = client.ask_once(client.Endpoint(where), {"op": "status"})
    assert found is not None
    slot = found["slots"][0]
    identity = json.dumps(slot["generations"][0]["identity"])
    source = str(Path(w.__file__).parent.parent)
    line = [sys.executable, "-I", "-S", "-c", ATTACHING, source, where, slot["slot"], identity]
    asking = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    attached = sum(int(process.communicate()[0]) for process in asking)
    print(f"the broker serves {attached / 3.0:,.0f} attaches a second (bar 1,000)")
    print(f"the broker takes {resident(found['broker']['pid']) / 1e6:.1f} MB (bar 20)")
    for reader in readers:
        reader.communicate()
    report.lease.close()


def read(path: Path, where: str) -> None:
    """Be a reader: attach, read every byte, say so, wait to be told to end."""
    into = model()
    report = w.load(w.TorchEngine(into), path, "gms", {"gms": {"socket_path": where}})
    total = sum(float(p.detach().view(torch.int16).sum()) for p in into.parameters())
    print(total, flush=True)
    sys.stdin.read()
    report.lease.close()


def broker_alone(where: Path) -> None:
    """Say how long a broker takes to start."""
    spent = []
    for _ in range(RUNS):
        where.parent.mkdir(mode=0o700, exist_ok=True)
        with started(where) as seconds:
            spent.append(seconds)
    print(f"the broker starts in {statistics.median(spent) * 1e3:.0f} ms (bar 100)")


@contextlib.contextmanager
def started(where: Path) -> Iterator[float]:
    """Start a broker as the first engine does; yield the seconds until it answers; end it."""
    endpoint = client.Endpoint(str(where))
    seconds, sock = timed(lambda: client.connect(endpoint, time.monotonic() + 30))
    sock.close()
    yield seconds
    found = client.ask_once(endpoint, {"op": "status"})
    assert found is not None
    os.kill(found["broker"]["pid"], 15)
    while where.exists():
        time.sleep(0.005)
    time.sleep(0.02)


def timed(step: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that `step` takes, and what it returns."""
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def private_bytes(pid: int) -> int:
    """Return the bytes of shared-memory mappings that a process has for itself."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = "memfd:weights" in line
        elif ours and line.startswith("Private"):
            total += int(line.split()[1]) * 1024
    return total


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
