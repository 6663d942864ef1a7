# SPDX-License-Identifier: Apache-2.0
"""A program: load, and maybe save, on every rank of a small engine, each a process of its own.

It is given a JSON object and prints, for each rank, what came of it.
"""

import json
import os
import sys
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

import torch

import weights_core as w
from weights_core.digest import checkpoint_digest
from weights_core.testing import host_of
from weights_core.testing.parallel import LlamaShape, TensorParallelEngine
from weights_presharded import save
from weights_presharded.manifest import digest_of
from weights_presharded.plugin import PreshardedPlugin


def rank_main(job, rank, channel):
    def gather(value, timeout):
        channel.send(value)
        return channel.recv()

    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    shape = LlamaShape(kv_heads=job["kv_heads"])
    engine = TensorParallelEngine(shape, size=job["size"], rank=rank, gather=gather, transforms=True)
    format = "disk" if job.get("save") else "presharded"
    host = host_of(presharded=PreshardedPlugin, config={"presharded": {"source": False, "target": False}})
    with w.open_session(engine, job["folder"], format, host=host) as session:
        session.resolve()
        session.load()
        session.apply()
        params = {name: digest_of(t.view(torch.uint8).numpy()) for name, t in engine.params.items()}
        if job.get("save"):
            save(engine, job["save"], digest=checkpoint_digest(Path(job["folder"])).value)
        session.publish(w.Layout.SHARDED)
        session.post_load()
        session.publish(w.Layout.FINAL)
        report = session.finish()
    inside = {
        Path(p).relative_to(job["folder"]).parts[0] for p in opened if p.startswith(job["folder"] + "/")
    }
    return {"provider": report.provider, "params": params, "opened": sorted(inside)}


def child(job, rank, channel):
    try:
        result = rank_main(job, rank, channel)
    except w.errors.WeightsError as exc:
        result = {"error": f"{type(exc).__name__}: {exc}"}
    channel.send(("done", result))


def main(job):
    torch.set_num_threads(1)
    channels, pids = [], []
    for rank in range(job["size"]):
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            child(job, rank, theirs)
            os._exit(0)
        theirs.close()
        channels.append(ours)
        pids.append(pid)
    results = {}
    while len(results) < len(channels):
        said = {}
        while len(said) + len(results) < len(channels):
            for channel in wait([c for i, c in enumerate(channels) if i not in said and i not in results]):
                rank = channels.index(channel)
                value = channel.recv()
                if isinstance(value, tuple) and value and value[0] == "done":
                    results[rank] = value[1]
                else:
                    said[rank] = value
        for rank in said:
            channels[rank].send([said.get(r) for r in range(len(channels))])
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    json.dump({"ranks": [results[r] for r in range(len(channels))], "codes": codes}, sys.stdout)


main(json.loads(sys.argv[1]))
