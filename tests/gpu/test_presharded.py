# SPDX-License-Identifier: Apache-2.0
"""Weights pulled from a peer on a GPU: straight into parameters or memory of its own, every byte checked."""

import json
import signal

import pytest
import torch
from stack import MIB, SIZE, Stack, free, meta, right, started, total

import weights_core as w
from weights_core.testing.waiting import until

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install weights-core[cuda]")
pytestmark = pytest.mark.gpu

PEER = """
import json, sys
import torch
import weights_core as w
from stack import Stack, meta, total
path, registry, device, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
in_place = settings.pop("in_place", False)
model = Stack().to(device) if in_place else meta()
before = [p.data_ptr() for p in model.parameters()]
config = {"presharded": {"registry": registry, "beat": 0.5, **settings}}
engine = w.TorchEngine(model, device=device, reinit=lambda model: None)
report = w.load(engine, path, "presharded", config)
torch.cuda.synchronize(device)
print(json.dumps({"provider": report.provider, "notes": list(report.notes),
                  "attempts": [str(a.reason) for a in report.attempts],
                  "receipts": [r.detail for r in report.receipts],
                  "moved": before != [p.data_ptr() for p in model.parameters()],
                  "tied": model.head.weight is model.layers[0].weight,
                  "total": total(p.cpu() for p in model.parameters())}), flush=True)
for line in sys.stdin:
    order = line.strip()
    if order == "spoil":
        with torch.no_grad():
            model.layers[7].weight.view(torch.int16).view(-1)[12345] ^= 1
        torch.cuda.synchronize(device)
    if order == "leave":
        report.lease.close()
        break
    print(json.dumps(order), flush=True)
"""
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU here")


@pytest.fixture
def registry(tmp_path):
    return str(tmp_path / "peers")


@pytest.fixture
def peer(path, registry):
    """Start processes that load and serve; each says what came."""
    running = []

    def start(device="cuda:0", **settings):
        process = started(PEER, path, registry, device, json.dumps(settings))
        running.append(process)
        return process, json.loads(process.stdout.readline())

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def load(path, registry):
    reports = []

    def load(into=None, device="cuda:0", **settings):
        into = meta() if into is None else into
        config = {"presharded": {"registry": registry, "beat": 0.5, **settings}}
        report = w.load(w.TorchEngine(into, device=device), path, "presharded", config)
        reports.append(report)
        return into, report

    yield load
    for report in reports:
        report.lease.close()


def told(process, order):
    process.stdin.write(f"{order}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def left(process):
    """Tell a process to leave; return how it ended."""
    process.stdin.write("leave\n")
    process.stdin.flush()
    return process.wait(60)


@pytest.mark.parametrize("verify", [True, False])
def test_a_peer_fills_memory_of_its_own_or_the_parameters(peer, load, tensors, verify):
    source, _ = peer()
    model, report = load(source=False, verify=verify)
    assert report.provider == "presharded", report.attempts
    print(f"\n{report.notes[0]}")
    assert right(model, tensors)
    assert model.head.weight is model.layers[0].weight
    model = Stack().to("cuda:0")
    addresses = [p.data_ptr() for p in model.parameters()]
    _, report = load(model, source=False, verify=verify)
    assert report.provider == "presharded", report.attempts
    print(report.notes[0])
    assert right(model, tensors)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert left(source) == 0


@pytest.mark.parametrize("in_place", [True, False])
def test_what_changed_on_the_device_is_found_and_disk_serves(peer, tensors, in_place):
    source, _ = peer()
    told(source, "spoil")
    _, found = peer(source=False, in_place=in_place)
    assert found["provider"] in ("disk", "parallel_shards")
    assert "arrived other than the source said, of 1 tensor: layers.7.weight" in " ".join(found["attempts"])
    assert found["total"] == total(tensors.values())
    assert found["tied"]


def test_a_source_that_dies_leaves_what_was_pulled(peer, load, tensors):
    source, _ = peer()
    model, report = load(source=False)
    source.send_signal(signal.SIGKILL)
    source.wait()
    assert report.provider == "presharded"
    assert right(model, tensors)
    _, report = load(source=False)
    assert report.provider != "presharded"


def test_a_target_serves_on_from_where_it_pulled(peer, tensors):
    first, _ = peer()
    _, second = peer()
    assert second["provider"] == "presharded"
    assert "; 0.0 MB moved to be served" in second["receipts"][0]
    assert left(first) == 0
    _, third = peer(source=False)
    assert third["provider"] == "presharded", third
    assert third["total"] == total(tensors.values())


def test_memory_returns_when_source_and_target_end(load):
    load()[1].lease.close()  # the first load of a process also loads kernels, which stay
    before = free()
    model, report = load()
    target, pulled = load(source=False)
    assert pulled.provider == "presharded", pulled.attempts
    assert before - free() >= 2 * SIZE
    pulled.lease.close()
    del target, pulled
    until(lambda: before - free() < SIZE + (1 << 30) + 64 * MIB)
    report.lease.close()
    del model, report
    until(lambda: before - free() < 16 * MIB)


def test_nixl_reads_ordinary_memory_of_the_device(peer, load, tensors):
    pytest.importorskip("nixl_cu13._api", reason="needs NIXL: pip install weights-presharded[nixl]")
    source, _ = peer(transport="nixl")
    model, report = load(source=False, transport="nixl")
    assert report.provider == "presharded", report.attempts
    print(f"\n{report.notes[0]}")
    assert right(model, tensors)
    told(source, "spoil")
    _, report = load(source=False, transport="nixl")
    assert report.provider != "presharded"
    assert "arrived other than the source said, of 1 tensor: layers.7.weight" in str(
        report.attempts[0].reason
    )
    assert left(source) == 0


@two
@pytest.mark.parametrize("transport", ["local", "nixl"])
def test_another_device_is_served(peer, load, tensors, transport):
    if transport == "nixl":
        pytest.importorskip("nixl_cu13._api", reason="needs NIXL: pip install weights-presharded[nixl]")
    source, _ = peer("cuda:0", transport=transport)
    model, report = load(device="cuda:1", source=False, transport=transport)
    assert report.provider == "presharded", report.attempts
    print(f"\n{report.notes[0]}")
    assert {p.device.index for p in model.parameters()} == {1}
    assert right(model, tensors)
    model = Stack().to("cuda:1")
    _, report = load(model, device="cuda:1", source=False, transport=transport)
    assert report.provider == "presharded", report.attempts
    assert right(model, tensors)
    assert left(source) == 0
