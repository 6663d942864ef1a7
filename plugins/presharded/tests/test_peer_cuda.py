# SPDX-License-Identifier: Apache-2.0
"""Between devices, on a stand-in whose memory is the host's: what is tried here is all but the driver."""

import gc

import attrs
import pytest
import torch

import weights_core as w
from weights_core import arena
from weights_core.backing import CudaBacking
from weights_core.errors import ArenaError
from weights_core.testing import FakeEngine, host_of, write_checkpoint
from weights_core.testing.checkpoints import random_tensor
from weights_core.testing.device import HostDevice, HostDriver
from weights_presharded.peer import devices, hashing, landing, local, offer, ordinary, target
from weights_presharded.peer.gates import Serving
from weights_presharded.peer.ordinary import OrdinaryBacking
from weights_presharded.plugin import PreshardedPlugin


@pytest.fixture
def driver():
    made = HostDriver()
    yield made
    gc.collect()
    assert (made.mapped, made.reserved) == ({}, {})


class OnDevice(FakeEngine):
    """An engine that says its tensors are a device's; with `meta`, they have no memory until they come."""

    def __init__(self, like, *, meta=False, writes=None):
        super().__init__(like, accepts={w.Layout.CHECKPOINT, w.Layout.SHARDED})
        self._info = attrs.evolve(self._info, device="cuda:0", post_load_writes=writes)
        self._meta = meta

    def tensors(self, layout):
        found = super().tensors(layout)
        return {n: t.to("meta") for n, t in found.items()} if self._meta and self.untouched() else found


def tensors():
    """Tensors of two blocks and of a few bytes, next to each other."""
    sizes = [3, 70_000, 1, 1 << 16, 9, 300_000, 5000]
    return {f"t{i}": random_tensor(size, dtype="U8", seed=i) for i, size in enumerate(sizes)}


@pytest.fixture
def load(driver, tmp_path, monkeypatch):
    """Load as if the engine's memory were the device's, in chunks and blocks that are small."""

    def backing(_):
        return CudaBacking(HostDevice(driver, granularity=1 << 16))

    for module in (offer, target):
        monkeypatch.setattr(module, "backing_for", backing)
    monkeypatch.setattr(local, "backing_of", backing)
    monkeypatch.setattr(devices, "CHUNK", 1 << 17)
    monkeypatch.setattr(hashing, "BLOCK", 1 << 16)
    for module in (landing, ordinary):
        monkeypatch.setattr(module, "plain", lambda device: lambda n: torch.empty(n, dtype=torch.uint8))
    given = tensors()
    path = write_checkpoint(tmp_path / "ckpt", given)
    loaded = []  # an engine that is dropped ends its lease

    def load(engine=None, **settings):
        engine = engine or OnDevice(given)
        config = {"presharded": {"registry": str(tmp_path / "peers"), "beat": 0.5, **settings}}
        host = host_of(config=config, presharded=PreshardedPlugin)
        report = w.load(engine, path, "presharded", host=host, progress="never")
        loaded.append((engine, report))
        return engine, report

    yield given, load
    while loaded:
        loaded.pop()[1].lease.close()


def holds(engine, given):
    return all(torch.equal(engine.params[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("meta", [True, False], ids=["segments", "parameters"])
def test_segments_come_whole_and_every_block_is_verified(load, meta, verify):
    given, load = load
    load()
    engine, report = load(OnDevice(given, meta=meta), source=False, verify=verify)
    assert report.provider == "presharded", report.attempts
    assert "by local" in report.notes[0]
    assert holds(engine, given)


def test_what_was_pulled_is_served_from_where_it_is(load):
    given, load = load
    _, first = load()
    _, second = load(OnDevice(given, meta=True))
    assert "; 0.0 MB moved to be served" in second.receipts[0].detail
    first.lease.close()
    engine, third = load(OnDevice(given, meta=True), source=False)
    assert third.provider == "presharded"
    assert holds(engine, given)


@pytest.mark.parametrize("meta", [True, False], ids=["segments", "parameters"])
@pytest.mark.parametrize("name", ["t1", "t4", "t6"])
def test_what_changes_after_it_was_offered_is_found_out(load, name, meta):
    """Nothing protects a device's memory: a byte that is another is found by the sums."""
    given, load = load
    source, _ = load()
    source.params[name][0] ^= 1
    engine, report = load(OnDevice(given, meta=meta), source=False)
    assert report.provider == "disk"
    assert name in report.attempts[0].reason
    assert "arrived other than the source said" in report.attempts[0].reason
    assert holds(engine, given)


def test_a_snapshot_is_in_the_hosts_memory_and_goes_to_a_device(load):
    given, load = load
    source, report = load(OnDevice(given, writes="everything"), snapshot=True)
    assert "0.4 MB held besides" in report.receipts[0].detail
    for tensor in source.params.values():
        tensor.fill_(7)
    engine, report = load(OnDevice(given, writes="everything"), source=False)
    assert report.provider == "presharded", report.attempts
    assert holds(engine, given)


def test_a_full_device_is_an_error_of_the_publish_alone(load, driver):
    given, load = load
    driver.room = 1 << 12
    engine, report = load()
    assert holds(engine, given)
    assert any("did not publish: the device cuda:0 is full" in note for note in report.notes)


def test_who_is_read_by_nixl_alone_serves_from_ordinary_memory(load, driver):
    """UCX stages memory that was mapped by hand through the host."""
    given, _ = load
    engine = OnDevice(given)
    for name, tensor in given.items():
        engine.params[name].copy_(tensor)
    made = offer.make_offer(
        engine, Serving(w.Layout.SHARDED, "live"), None, expected_bytes=1 << 20, threads=1, transport="nixl"
    )
    assert (made.memory, driver.mapped) == ("cuda", {})
    assert {segment.descriptor for segment in made.segments} == {-1}
    assert holds(engine, given)
    for name, place in made.manifest.places.items():
        assert made.segments[0].address + place.offset == engine.params[name].data_ptr()
    assert made.sums == offer.segment_sums(made.manifest, made.segments)
    made.close()


def test_ordinary_memory_is_told_to_be_full_and_refuses_what_it_cannot_do(driver):
    def take(nbytes):
        if nbytes > 1000:
            raise torch.OutOfMemoryError("full")
        return torch.zeros(nbytes, dtype=torch.uint8)

    memory = OrdinaryBacking(CudaBacking(HostDevice(driver)), take)
    with pytest.raises(ArenaError, match="is full: 2,000 bytes"):
        memory.create(2000, private=False)
    segment = memory.create(1000, private=False)
    assert segment.fitted(10) == 1000
    for refused in (segment.sleep, lambda: segment.wake(3, 1000), lambda: memory.attach(3, 9, private=False)):
        with pytest.raises(ArenaError, match="ordinary memory of a device cannot"):
            refused()


def test_segments_are_mapped_while_others_are_copied(load, monkeypatch):
    """And only what is used of each is copied."""
    given, load = load
    monkeypatch.setattr(arena, "SEGMENT", 1 << 17)
    steps = []
    monkeypatch.setattr(devices.Streams, "copying", told(steps, "copy", devices.Streams.copying))
    attach = CudaBacking.attach
    monkeypatch.setattr(CudaBacking, "attach", told(steps, "map", attach))
    load()
    engine, report = load(OnDevice(given, meta=True), source=False)
    assert report.provider == "presharded", report.attempts
    assert steps[:4] == ["map", "copy", "map", "copy"]
    assert report.nbytes < sum(-(-t.numel() // 256) * 256 for t in given.values()) + 1
    assert holds(engine, given)


def told(steps, what, real):
    def step(*args, **options):
        steps.append(what)
        return real(*args, **options)

    return step


def test_sums_see_every_word_and_every_exchange():
    factors = hashing.multipliers("cpu")
    words = torch.randint(-(1 << 62), 1 << 62, (factors.numel() + 1000,))
    flat = words.view(torch.uint8)
    before = hashing.block_sums(flat, factors).tolist()
    assert len(before) == 2
    for at, block in ((0, 0), (flat.numel() - 1, 1), (hashing.BLOCK - 1, 0), (hashing.BLOCK, 1)):
        for bit in range(8):
            flat[at] ^= 1 << bit
            after = hashing.block_sums(flat, factors).tolist()
            assert [a == b for a, b in zip(before, after, strict=True)] == [block != 0, block != 1]
            flat[at] ^= 1 << bit
    words[[5, 900]] = words[[900, 5]]
    assert hashing.block_sums(flat, factors).tolist()[0] != before[0]


def test_factors_are_odd_and_the_same_everywhere():
    factors = hashing.multipliers("cpu")
    assert bool((factors & 1).all())
    assert factors.unique().numel() == factors.numel()
    assert factors[:3].tolist() == [-926173328514898677, -4040585362355130271, -8177556360850838933]
