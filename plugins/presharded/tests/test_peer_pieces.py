# SPDX-License-Identifier: Apache-2.0
"""The pieces of a pull, tried in one process: ties, views and strides, huge pages, whole models of torch."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import weights_core as w
from weights_core.backing import HostBacking
from weights_core.memory import HostSegment
from weights_core.testing import FakeEngine, host_of, write_checkpoint
from weights_core.testing.leftovers import Held
from weights_presharded.peer import catalog, copying, hashing, landing, server
from weights_presharded.peer.client import PeerError
from weights_presharded.peer.copying import Check, Copy, Pool
from weights_presharded.peer.gates import Serving
from weights_presharded.peer.offer import make_offer, read_described
from weights_presharded.peer.settling import Settling
from weights_presharded.plugin import PreshardedPlugin


class Tied(nn.Module):
    """A model with a tie, a view, a transposed parameter, a buffer, and nothing in one of its tensors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(40, 50).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("scale", torch.randn(7))


@pytest.fixture
def load(tmp_path):
    truth = Tied()
    path = write_checkpoint(
        tmp_path / "ckpt", {n: t.contiguous().clone() for n, t in truth.state_dict().items()}
    )
    kept = []

    def load(*, meta=True, **settings):
        with torch.device("meta" if meta else "cpu"):
            model = Tied()
        config = {"presharded": {"registry": str(tmp_path / "peers"), "beat": 0.5, **settings}}
        host = host_of(config=config, presharded=PreshardedPlugin)
        report = w.load(w.TorchEngine(model), path, "presharded", host=host, progress="never")
        kept.append((model, report))
        return model, report

    yield truth, load
    while kept:
        kept.pop()[1].lease.close()


@pytest.mark.parametrize("meta", [True, False])
def test_a_torch_model_is_pulled_with_its_ties_views_and_strides(load, meta):
    truth, load = load
    load(meta=False)
    model, report = load(meta=meta)
    assert report.provider == "presharded", report.attempts
    assert model.head.weight is model.embed.weight
    for name, tensor in truth.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert report.nbytes == sum(t.untyped_storage().nbytes() for t in {*truth.parameters(), truth.scale})
    with torch.no_grad():
        model.embed.weight.zero_()  # it is the engine's own
    again, report = load(meta=meta, source=False)
    assert torch.equal(again.embed.weight, truth.embed.weight)


def test_a_model_that_is_dropped_ends_its_offer_and_gives_back_everything(tmp_path):
    path = write_checkpoint(tmp_path / "ckpt", {"weight": torch.randn(64, 64), "bias": torch.randn(64)})
    config = {"presharded": {"registry": str(tmp_path / "peers"), "beat": 0.5}}

    def cycle():
        host = host_of(config=config, presharded=PreshardedPlugin)
        models = [nn.Linear(64, 64), nn.Linear(64, 64)]
        reports = [w.load(w.TorchEngine(m), path, "presharded", host=host, progress="never") for m in models]
        assert [r.provider for r in reports] == ["disk", "presharded"]

    cycle()
    gc.collect()
    before = Held.now()
    cycle()
    gc.collect()
    assert before.left_over(settle=10) == []
    assert [p.name for p in (tmp_path / "peers").iterdir()] == ["token"]


def test_a_report_that_is_kept_keeps_no_weights(tmp_path):
    path = write_checkpoint(tmp_path / "ckpt", {"weight": torch.randn(64, 64), "bias": torch.randn(64)})
    config = {"presharded": {"registry": str(tmp_path / "peers"), "beat": 0.5}}
    host = host_of(config=config, presharded=PreshardedPlugin)
    model = nn.Linear(64, 64)
    report = w.load(w.TorchEngine(model), path, "presharded", host=host, progress="never")
    mapped = f"{model.weight.data_ptr() & -4096:x}-"
    assert any(line.startswith(mapped) for line in Path("/proc/self/maps").read_text().splitlines())
    report.lease.close()
    del model
    gc.collect()
    assert not any(line.startswith(mapped) for line in Path("/proc/self/maps").read_text().splitlines())
    assert report.receipts


def test_a_source_that_begins_is_not_swept_up_by_another(load, tmp_path, monkeypatch):
    """Ranks start together, and each takes away the sockets where nobody listens."""
    _, load = load
    chmod, swept = os.chmod, []

    def meanwhile(path, mode):
        if str(path).startswith("/proc/self/fd/"):
            server._sweep(str(tmp_path / "peers"))
            swept.append(path)
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", meanwhile)
    _, report = load(meta=False)
    assert swept
    assert report.receipts
    _, report = load(meta=True, source=False)
    assert report.provider == "presharded", report.attempts


def offered(tensors):
    engine = FakeEngine(tensors)
    for name, tensor in tensors.items():
        engine.params[name].copy_(tensor)
    made = make_offer(engine, Serving(w.Layout.SHARDED, "live"), None, expected_bytes=1 << 20, threads=2)
    return engine, made, read_described(made.described())[0]


def test_ties_that_differ_are_refused_by_name():
    one = torch.randn(4)
    engine, offer, manifest = offered({"a": one, "b": torch.randn(4), "c": torch.randn(4)})
    tied = dict(engine.params)
    tied["b"] = tied["a"]
    with pytest.raises(PeerError, match="a and b are one tensor here, and several there"):
        catalog.check(manifest, engine, tied)
    catalog.check(manifest, engine, engine.params)
    offer.close()


def test_views_of_one_storage_come_once_and_stay_views():
    base = torch.arange(100, dtype=torch.int32)
    engine = FakeEngine({"whole": base, "part": base[10:30], "other": base[:5]})
    engine.params = {"whole": base, "part": base[10:30], "other": base[:5]}
    offer = make_offer(engine, Serving(w.Layout.SHARDED, "live"), None, expected_bytes=1000, threads=1)
    assert landing.ranges(offer.manifest) == [(0, 0, 400)]
    there = landing.in_own_memory(offer.manifest, None, "cpu", whole_segments=False)
    assert [run.nbytes for run in there.runs] == [400]
    Pool(2).copy([Copy(offer.segments[0].address, there.runs[0].out.data_ptr(), 400)], lambda: None)
    assert torch.equal(there.tensors["part"], base[10:30])
    there.tensors["whole"][10] = -1
    assert there.tensors["part"][0] == -1
    offer.close()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("verified", [True, False])
def test_every_byte_is_copied_whatever_its_share(threads, verified, monkeypatch):
    monkeypatch.setattr(copying, "PIECE", 1 << 10)
    monkeypatch.setattr(copying, "SPLIT", 1 << 12)
    sizes = [0, 1, 1023, 1024, 1025, 4096, 4097, 100_000, *range(1, 200)]
    source = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8)
    out = torch.zeros_like(source)
    copies, at = [], 0
    for size in sizes:
        here, there = source.data_ptr() + at, out.data_ptr() + at
        checks = [Check(f"{at}", there, size, hashing.digest(here, size))] if verified else []
        copies.append(Copy(here, there, size, checks))
        at += size
    Pool(threads).copy(copies, lambda: None)
    assert torch.equal(source, out)


def test_a_wrong_digest_stops_the_others_and_names_the_tensor():
    data = torch.zeros(1000, dtype=torch.uint8)
    wrong = Check("wrong", data.data_ptr(), 1000, "xxh3_128:" + "0" * 32)
    with pytest.raises(PeerError, match="tensor 'wrong' arrived with the digest xxh3_128:"):
        Pool(2).verify([wrong] * 50, lambda: None)


def test_a_caller_that_gives_up_ends_the_threads():
    data = torch.zeros(64 << 20, dtype=torch.uint8)

    def give_up():
        raise KeyboardInterrupt

    check = Check("x", data.data_ptr(), data.numel(), hashing.digest(data.data_ptr(), data.numel()))
    with pytest.raises(KeyboardInterrupt):
        Pool(1).verify([check] * 5000, give_up)  # minutes, if it were not ended


@pytest.mark.parametrize("size", [1000, 4 << 20, (6 << 20) + 12345])
def test_huge_pages_change_nothing_for_who_reads_and_who_has_written(size):
    ours = HostBacking().create(size, private=True)
    first = torch.randint(0, 256, (size,), dtype=torch.uint8)
    mine = ours.tensor(0, size)
    mine.copy_(first)
    ours.seal(size)
    mine[:100] = 7
    settling = Settling([ours], [size])
    theirs = HostSegment.attach(os.dup(ours.descriptor), size, "read")
    assert torch.equal(theirs.tensor(0, size), first)
    while settling._thread.is_alive():
        settling._thread.join(0.1)
    mine[200:300] = 9
    assert torch.equal(theirs.tensor(0, size), first)
    assert bool((mine[:100] == 7).all())
    assert bool((mine[200:300] == 9).all())
    assert torch.equal(mine[300:], first[300:])
    settling.close()
    for segment in (ours, theirs):
        segment.close()


def test_settling_ends_when_it_is_told_to():
    ours = HostBacking().create(64 << 20, private=True)
    ours.tensor(0, 64 << 20).fill_(1)
    ours.seal(64 << 20)
    settling = Settling([ours], [64 << 20])
    settling.close()
    assert not settling._thread.is_alive()
    ours.close()
