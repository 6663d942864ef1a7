# SPDX-License-Identifier: Apache-2.0
"""What the vault does on a device, on a stand-in whose memory is the host's.

What a real device does is tested on a GPU, by tests/gpu/test_gms.py.
"""

import gc

import attrs
import pytest
import torch
from torch import nn

import weights_core as w
from weights_core.backing import CudaBacking
from weights_core.errors import ArenaError
from weights_core.testing import host_of, write_checkpoint
from weights_core.testing.device import HostDevice, HostDriver
from weights_gms.plugin import GmsPlugin


@pytest.fixture
def driver():
    made = HostDriver()
    yield made
    gc.collect()
    assert (made.mapped, made.reserved) == ({}, {})


@pytest.fixture
def load(driver, where, tmp_path, monkeypatch):
    """Load through gms as if the engine's memory were the device's."""
    monkeypatch.setattr("weights_gms.owner.backing_for", lambda info: CudaBacking(HostDevice(driver)))
    source = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    path = write_checkpoint(tmp_path / "ckpt", source.state_dict())
    reports = []

    def load(engine=w.TorchEngine, *, meta=True, **config):
        with torch.device("meta" if meta else "cpu"):
            made = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
        host = host_of(config={"gms": {"socket_path": where, "timeout": 10.0, **config}}, gms=GmsPlugin)
        report = w.load(engine(made), path, "gms", host=host)
        reports.append(report)
        return made, report

    yield source, load
    for report in reports:
        report.lease.close()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def access(tensor):
    """Return what this process may do at a tensor's address, as the kernel says it."""
    address = tensor.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= address < high:
                return line.split()[1]
    return None


@pytest.mark.parametrize("meta", [True, False])
def test_write_read_sleep_and_wake(load, meta):
    source, load = load
    (first, wrote), (second, read) = load(meta=meta), load()
    assert "wrote slot weights/GPU-host/-/main/0of1" in " ".join(wrote.notes)
    for made, report in ((first, wrote), (second, read)):
        assert same(made, source)
        assert access(made[0].weight) == "r--s"
        addresses = [p.data_ptr() for p in made.parameters()]
        report.lease.owned.sleep()
        assert access(made[0].weight) == "---p"
        report.lease.owned.wake()
        assert [p.data_ptr() for p in made.parameters()] == addresses
        assert same(made, source)
        assert access(made[0].weight) == "r--s"


def test_copies_of_its_own_where_post_load_writes(load):
    source, load = load

    class Doubling(w.TorchEngine):
        @property
        def info(self):
            return attrs.evolve(super().info, post_load_writes="doubles")

        def post_load(self, layout):
            self.model[0].weight.data.mul_(2)

    for _ in range(2):
        made, report = load(Doubling)
        assert torch.equal(made[0].weight, 2 * source[0].weight)
        assert torch.equal(made[1].weight, source[1].weight)
        assert "0.8 MB shared, 0.8 MB of it copied" in " ".join(report.notes), report.notes


def test_a_full_device_is_a_clear_error(load, driver):
    source, load = load
    kept = load()
    driver.room = 1000
    with pytest.raises(ArenaError, match=r"the device cuda:0 is full \(cuMemCreate\)"):
        load(mode="rw")
    assert same(load()[0], source)
    assert kept
