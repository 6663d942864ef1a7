# SPDX-License-Identifier: Apache-2.0
"""A process that loads and serves as it is told, step by step, one line of JSON at a time.

The nursery imports torch once and forks a worker for each order. What a step raises is its answer.
"""

import gc
import hashlib
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import attrs
import torch

import weights_core as w
from weights_core.errors import PublishError
from weights_core.memory import HostSegment
from weights_core.tensors import as_bytes
from weights_core.testing import host_of
from weights_core.testing.parallel import LlamaShape, TensorParallelEngine
from weights_presharded.peer import copying, local, nixl, server
from weights_presharded.peer import source as publishing
from weights_presharded.plugin import PreshardedPlugin


class Gathering:
    """Every rank's value, swapped through files."""

    def __init__(self, folder, size, rank):
        self.folder, self.size, self.rank, self.count = Path(folder), size, rank, 0

    def __call__(self, value, timeout):
        self.count += 1
        part = self.folder / f".{self.count}-{self.rank}"
        part.write_bytes(pickle.dumps(value))
        part.rename(self.folder / f"{self.count}-{self.rank}")
        end, values = time.monotonic() + timeout, []
        for rank in range(self.size):
            path = self.folder / f"{self.count}-{rank}"
            while not path.exists():
                if time.monotonic() > end:
                    raise TimeoutError(f"rank {rank} stayed away")
                time.sleep(0.002)
            values.append(pickle.loads(path.read_bytes()))
        return values


class Watched(TensorParallelEngine):
    """An engine that remembers what its post-load found."""

    seen = None

    def __init__(self, *args, declares=True, version="1", dtype=None, final=False, **options):
        super().__init__(*args, **options)
        writes = self._info.post_load_writes if declares else None
        self._info = attrs.evolve(
            self._info,
            version=version,
            dtype=dtype or self._info.dtype,
            post_load_writes=writes,
            accepts=set(w.Layout) if final else self._info.accepts,
        )

    def post_load(self, layout):
        self.seen = summed(self.params)
        super().post_load(layout)


class NoReinit(Watched):
    """An engine that cannot be brought back."""

    def reinit(self):
        raise w.errors.EngineError("there is no way back")


def summed(tensors):
    """Return one digest of all names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + as_bytes(tensors[name]).numpy().tobytes())
    return found.hexdigest()


class Worker:
    def __init__(self, **settings):
        self.settings = settings
        self.report = self.engine = self.moved = None
        self.watch()

    def watch(self, real=publishing.make_offer):
        """Remember how many bytes are moved to be served."""

        def make(*args, **options):
            offer = real(*args, **options)
            self.moved = offer.moved
            return offer

        publishing.make_offer = make

    def load(
        self,
        checkpoint,
        format="presharded",
        size=1,
        rank=0,
        gather=None,
        hold=None,
        hold_reads=None,
        hold_copies=None,
        reinit=True,
        timeout=60,
        engine=(),
        plugins=(),
        kv_heads=2,
        vocab=48,
        **config,
    ):
        if hold is not None:
            held_at(Path(hold))
        if hold_reads is not None:
            held_while_reading(Path(hold_reads))
        if hold_copies is not None:
            held_while_copying(Path(hold_copies))
        kind = Watched if reinit else NoReinit
        options = dict(engine)
        if gather is not None:
            options["gather"] = Gathering(gather, size, rank)
        self.engine = kind(LlamaShape(kv_heads=kv_heads, vocab=vocab), size=size, rank=rank, **options)
        settings = {**self.settings, **config}
        own = {name: settings.pop(name) for name in list(settings) if isinstance(settings[name], dict)}
        host = host_of(
            config={"presharded": settings, **own},
            presharded=PreshardedPlugin,
            **{name: PLUGINS[name]() for name in plugins},
        )
        started = time.monotonic()
        self.report = w.load(self.engine, checkpoint, format, host=host, progress="never", timeout=timeout)
        return self.told() | {"seconds": time.monotonic() - started}

    def told(self):
        report = self.report
        return {
            "provider": report.provider,
            "seen": self.engine.seen,
            "now": summed(self.engine.params),
            "notes": list(report.notes),
            "published": [r.detail for r in report.receipts],
            "layouts": [r.layout.value for r in report.receipts],
            "attempts": {a.plugin: a.reason for a in report.attempts},
            "decisions": {d.plugin: d.reason for d in report.plan.decisions},
            "bytes": report.nbytes,
            "share": self.engine.share,
            "moved": self.moved,
        }

    def now(self):
        return summed(self.engine.params)

    def scribble(self):
        for tensor in self.engine.params.values():
            tensor.fill_(7)

    def close(self):
        self.report.lease.close()

    def leave(self):
        """End as programs do."""
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()

    def shared(self):
        with open("/proc/self/maps") as maps:
            return sum("memfd:" in line for line in maps)

    def descriptors(self):
        return len(os.listdir("/proc/self/fd"))

    def drop(self):
        """Forget the model; what it took is given back."""
        self.engine = self.report = None
        gc.collect()

    def impatient(self):
        """Believe of a target that is silent for long that it has gone, after a second."""
        server.SILENT_SECONDS = 1.0

    def holds(self):
        """Return what grows in a process that gives something not back."""
        status = Path("/proc/self/status").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in status if line.endswith(" kB")}
        return {
            "descriptors": self.descriptors(),
            "threads": len(os.listdir("/proc/self/task")),
            "mappings of shared memory": self.shared(),
            "bytes": 1024 * (kilobytes["RssAnon"] + kilobytes["RssShmem"]),
        }

    def spoil(self, how):
        """Make what this process is about to offer wrong, after it was hashed."""
        real = publishing.make_offer

        def make(*args, **options):
            offer = real(*args, **options)
            return SPOILERS[how](offer)

        publishing.make_offer = make


def _flip(offer):
    """One bit is another in a copy of the first segment."""
    segment, size = offer.segments[0], offer.manifest.sizes[0]
    other = HostSegment.create(size)
    other.tensor(0, size).copy_(segment.tensor(0, size))
    other.tensor(0, size)[size // 2] ^= 4
    other.seal(size)
    return attrs.evolve(offer, segments=[other, *offer.segments[1:]])


def _truncate(offer):
    other = HostSegment.create(4096)
    other.seal(4096)
    return attrs.evolve(offer, segments=[other, *offer.segments[1:]])


def _unsealed(offer):
    segment, size = offer.segments[0], offer.manifest.sizes[0]
    other = HostSegment.create(size)
    other.tensor(0, size).copy_(segment.tensor(0, size))
    return attrs.evolve(offer, segments=[other, *offer.segments[1:]])


def _without(offer):
    places = dict(offer.manifest.places)
    del places["norm"]
    return attrs.evolve(offer, manifest=attrs.evolve(offer.manifest, places=places))


def _with(offer):
    places = dict(offer.manifest.places)
    places["stranger"] = places["norm"]._replace(name="stranger")
    digests = {**offer.manifest.digests, "stranger": offer.manifest.digests["norm"]}
    return attrs.evolve(offer, manifest=attrs.evolve(offer.manifest, places=places, digests=digests))


def _reshaped(offer):
    places = dict(offer.manifest.places)
    norm = places["norm"]
    places["norm"] = norm._replace(shape=(2, norm.shape[0] // 2), strides=(norm.shape[0] // 2, 1))
    return attrs.evolve(offer, manifest=attrs.evolve(offer.manifest, places=places))


def _no_digest(offer):
    digests = {name: digest for name, digest in offer.manifest.digests.items() if name != "norm"}
    return attrs.evolve(offer, manifest=attrs.evolve(offer.manifest, digests=digests))


def _fail(offer):
    offer.close()
    raise PublishError("told to fail")


SPOILERS = {
    "bit flip": _flip,
    "truncation": _truncate,
    "unsealed": _unsealed,
    "missing": _without,
    "extra": _with,
    "reshaped": _reshaped,
    "no digest": _no_digest,
    "fail": _fail,
}


def _gms():
    from weights_gms.plugin import GmsPlugin

    return GmsPlugin


def _consumable():
    from weights_consumable.plugin import ConsumablePlugin

    return ConsumablePlugin


PLUGINS = {"gms": _gms, "consumable": _consumable}


def wait_in(folder):
    (folder / f"held-{os.getpid()}").touch()
    end = time.monotonic() + 30
    while not (folder / "go").exists() and time.monotonic() < end:
        time.sleep(0.005)


def held_at(folder):
    """Have the transfer wait, once the source has said where its memory is, until it may go on."""
    for transport in (local.LocalTransport, nixl.NixlTransport):

        def fetch(self, given, real=transport.fetch):
            wait_in(folder)
            return real(self, given)

        transport.fetch = fetch


def held_while_reading(folder, real=nixl._read):
    """Have NIXL read in many small pieces, and wait when some are here and others on their way."""
    nixl.PIECE, nixl.LARGEST, nixl.READS = 4096, 4096, 4

    def read(agent, *given):
        check, ended = agent.agent.check_xfer_state, []

        def state(handle):
            found = check(handle)
            if found == "DONE":
                ended.append(handle)
                if len(ended) == 3:
                    wait_in(folder)
            return found

        agent.agent.check_xfer_state = state
        try:
            return real(agent, *given)
        finally:
            del agent.agent.check_xfer_state  # else the agent would keep itself alive

    nixl._read = read


def held_while_copying(folder, real=copying._compare):
    """Have one thread copy, and wait when some tensors are here and others are not."""
    compared = []

    def compare(*given):
        real(*given)
        compared.append(given)
        if len(compared) == 3:
            wait_in(folder)

    copying._compare = compare


def serve(settings, channel):
    os.environ.update(settings.pop("environ", {}))
    worker = Worker(**settings)
    lines = channel.makefile("rw")
    for line in lines:
        step = json.loads(line)
        do = step.pop("do")
        if do == "leave":
            return
        try:
            told = getattr(worker, do)(**step)
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            told = {
                "error": type(error).__name__,
                "why": str(error),
                "notes": notes,
                "trace": traceback.format_exc(),
            }
        lines.write(json.dumps(told) + "\n")
        lines.flush()


def nursery(orders):
    """Fork a worker for each order that comes; tell its pid, and later how it ended."""
    while True:
        raw, fds, _, _ = socket.recv_fds(orders, 1 << 16, 1)
        if not raw:
            return
        order = json.loads(raw)
        if "reap" in order:
            _, status = os.waitpid(order["reap"], 0)
            orders.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        child = os.fork()
        if child == 0:
            orders.close()
            serve(order, socket.socket(fileno=fds[0]))
            sys.exit(0)
        os.close(fds[0])
        orders.send(str(child).encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    nursery(socket.socket(fileno=int(sys.argv[1])))
