# SPDX-License-Identifier: Apache-2.0
"""Weights shared between processes on one GPU: one copy, read-only, alive as long as somebody reads."""

import json
import os
import signal
import time

import pytest
import torch
from stack import MIB, SIZE, WIDTH, Stack, free, meta, right, started, total

import weights_core as w
from weights_core.errors import ArenaError, IdentityMismatchError
from weights_core.testing import write_checkpoint
from weights_core.testing.waiting import until
from weights_gms import client
from weights_gms.holding import StaleWeights

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install weights-gms[cuda]")
pytestmark = pytest.mark.gpu
READER = """
import json, os, sys, time
from pathlib import Path
import torch
import weights_core as w
from stack import meta, total
from weights_core.checkpoint import find
from weights_core.digest import content_digest
content_digest(find(Path(sys.argv[1])))
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
before = torch.cuda.mem_get_info()[0]
model, config = meta(), {"gms": {"socket_path": sys.argv[2]}}
start = time.perf_counter()
report = w.load(w.TorchEngine(model, device="cuda"), sys.argv[1], "gms", config)
torch.cuda.synchronize()
seconds = time.perf_counter() - start
used = before - torch.cuda.mem_get_info()[0]
print(json.dumps({"seconds": seconds, "used": used, "total": total(model.parameters()),
                  "notes": list(report.notes), "tied": model.head.weight is model.layers[0].weight}),
      flush=True)
for line in sys.stdin:
    if line.strip() == "write":
        try:
            model.layers[1].weight.data.fill_(1)
            torch.cuda.synchronize()
            print(json.dumps("written"), flush=True)
        except Exception as error:
            print(json.dumps(f"trapped: {error}"[:60]), flush=True)
            os._exit(1)
"""


@pytest.fixture
def where(tmp_path):
    return str(tmp_path / "run" / "broker.sock")


@pytest.fixture
def load(path, where):
    reports = []

    def load(into=None, *, checkpoint=path, engine=w.TorchEngine, **config):
        into = meta() if into is None else into
        gms = {"socket_path": where, "timeout": 60.0, **config}
        report = w.load(engine(into, device="cuda"), checkpoint, "gms", {"gms": gms})
        reports.append(report)
        return into, report

    yield load
    for report in reports:
        report.lease.close()


@pytest.fixture
def reader(path, where):
    """Start processes that read; each says what it found."""
    running = []

    def start():
        process = started(READER, path, where)
        running.append(process)
        return process, json.loads(process.stdout.readline())

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True, scope="module")
def loaded_before(path, tmp_path_factory):
    """The first load of a process also loads kernels, which stay on the device."""
    where = str(tmp_path_factory.mktemp("first") / "broker.sock")
    w.load(w.TorchEngine(meta(), device="cuda"), path, "gms", {"gms": {"socket_path": where}}).lease.close()


def test_one_copy_for_writer_and_readers(load, reader, tensors):
    before = free()
    torch.cuda.reset_peak_memory_stats()
    model, wrote = load()
    print(
        f"\nwriter {wrote.seconds:.2f} s, {before - free() >> 20} MiB of the device, model {SIZE >> 20} MiB"
    )
    assert right(model, tensors)
    assert model.head.weight is model.layers[0].weight
    assert before - free() < SIZE + (1 << 30) + 64 * MIB
    for _ in range(2):
        _, told = reader()
        print(f"reader: {told['seconds'] * 1e3:.1f} ms, {told['used'] / MIB:.1f} MiB beyond its context")
        assert told["total"] == total(tensors.values())
        assert told["tied"]
        assert told["used"] < 64 * MIB
        assert "read slot" in " ".join(told["notes"])


def test_a_model_with_memory_is_moved_by_arenas(load, tensors):
    before = free()
    model = Stack().cuda()
    lowest = []
    create = torch.cuda.empty_cache

    def watched():
        create()
        lowest.append(torch.cuda.mem_get_info()[0])

    torch.cuda.empty_cache = watched
    try:
        load(model)
    finally:
        torch.cuda.empty_cache = create
    assert right(model, tensors)
    assert before - free() < SIZE + (1 << 30) + 64 * MIB
    assert before - min(lowest) < SIZE + 2 * (1 << 30) + 64 * MIB


def test_memory_returns_with_the_last_lease(load, reader, where):
    before = free()
    model, report = load()
    process, _ = reader()
    report.lease.close()
    del model, report
    assert before - free() > SIZE // 2
    process.kill()
    process.wait()
    until(lambda: before - free() < 16 * MIB)


def test_a_killed_writer_leaves_its_readers_and_the_next(path, where, reader, load, tensors):
    writer, _ = reader()
    second, told = reader()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    model, report = load()
    assert "read slot" in " ".join(report.notes)
    assert right(model, tensors)
    assert second.poll() is None
    assert told["tied"]


def test_a_killed_broker_is_replaced_with_what_is_held(load, where, reader):
    model, _ = load()
    endpoint = client.Endpoint(where)
    killed = client.ask_once(endpoint, {"op": "status"})["broker"]["pid"]
    os.kill(killed, signal.SIGKILL)
    _, told = reader()
    assert "read slot" in " ".join(told["notes"])
    assert model is not None


def test_a_write_is_trapped(load, reader, tensors):
    model, _ = load()
    process, _ = reader()
    process.stdin.write("write\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()).startswith("trapped")
    assert right(model, tensors)


def test_sleep_and_wake_under_a_captured_graph(load, tensors):
    keeper = load()
    model, report = load()
    x = torch.randn(2, WIDTH, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out.copy_(model(x))
        graph.replay()
        torch.cuda.synchronize()
        first = out.clone()
        start = time.perf_counter()
        report.lease.owned.sleep()
        middle = time.perf_counter()
        report.lease.owned.wake()
        print(f"\nsleep {(middle - start) * 1e3:.1f} ms, wake {(time.perf_counter() - middle) * 1e3:.1f} ms")
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, first)
    assert right(model, tensors)
    assert keeper


def test_weights_replaced_while_asleep_are_stale(load):
    _, report = load()
    report.lease.owned.sleep()
    kept = load(mode="rw")
    with pytest.raises(StaleWeights):
        report.lease.owned.wake()
    assert kept


class Doubling(w.TorchEngine):
    """Its post-load writes in place."""

    @property
    def info(self):
        import attrs

        return attrs.evolve(super().info, post_load_writes="doubles a layer")

    def post_load(self, layout):
        self.model.layers[1].weight.data.mul_(2)


def test_post_load_in_place_gets_a_copy_of_its_own(load, tensors):
    for _ in range(2):
        model, _ = load(engine=Doubling)
        assert torch.equal(model.layers[1].weight.cpu(), 2 * tensors["layers.1.weight"])
        assert torch.equal(model.layers[2].weight.cpu(), tensors["layers.2.weight"])


def test_a_full_device_is_a_clear_error_and_the_old_generation_intact(load, tensors):
    model, _ = load()
    hog = torch.empty(free() - SIZE // 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(ArenaError, match="is full"):
        load(mode="rw")
    del hog
    assert right(model, tensors)
    second, report = load()
    assert "read slot" in " ".join(report.notes)
    assert right(second, tensors)


def test_other_weights_of_the_same_shapes_are_refused(load, tmp_path, tensors):
    kept = load()
    other = write_checkpoint(tmp_path / "other", {name: t + 1 for name, t in tensors.items()}, shards=4)
    with pytest.raises(IdentityMismatchError, match="digest"):
        load(checkpoint=other)
    assert kept


def test_cycles_leak_no_device_memory_and_no_descriptor(load):
    kept = load()

    def cycle():
        _, report = load()
        report.lease.close()

    cycle()
    before = free(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        cycle()
    print(f"\nafter 20 cycles: {(before[0] - free()) / MIB:.1f} MiB")
    assert abs(before[0] - free()) < 16 * MIB
    assert len(os.listdir("/proc/self/fd")) == before[1]
    assert kept
