# SPDX-License-Identifier: Apache-2.0
"""The logic of device segments on a stand-in of the driver whose memory is the host's.

What the real driver does is tested on a GPU, by tests/gpu/test_gms.py.
"""

import ctypes
import gc
import mmap
import os
import sys
import types

import pytest
import torch
from torch import nn

import weights_core as w
from weights_core import memory
from weights_core.errors import ArenaError, ExtraNotInstalledError
from weights_core.testing import host_of, write_checkpoint
from weights_gms import backing, cuda
from weights_gms.cuda import CudaBacking, CudaSegment, Device
from weights_gms.plugin import GmsPlugin

OK, FULL = "success", "out of memory"


class Driver:
    """The calls that `Device` makes, on memfds: handles are descriptors, addresses are the host's."""

    CUresult = types.SimpleNamespace(CUDA_SUCCESS=OK, CUDA_ERROR_OUT_OF_MEMORY=FULL)
    CUmemAccess_flags = types.SimpleNamespace(
        CU_MEM_ACCESS_FLAGS_PROT_READ=mmap.PROT_READ,
        CU_MEM_ACCESS_FLAGS_PROT_READWRITE=mmap.PROT_READ | mmap.PROT_WRITE,
    )

    def __init__(self):
        self.room = 1 << 40
        self.reserved = {}
        self.mapped = {}
        self.libc = memory._libc()
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    @staticmethod
    def CUmemAccessDesc():  # noqa: N802 - the driver's name
        return types.SimpleNamespace(location=types.SimpleNamespace(), flags=None)

    def _fixed(self, address, length, fd):
        flags = 0x10 | (mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        assert self.libc.mmap(address, length, 0, flags, fd, 0) == address

    def cuMemCreate(self, length, properties, flags):  # noqa: N802
        if length > self.room:
            return FULL, None
        handle = os.memfd_create("fake-device")
        os.ftruncate(handle, length)
        return OK, handle

    def cuMemExportToShareableHandle(self, handle, kind, flags):  # noqa: N802
        return OK, os.dup(handle)

    def cuMemImportFromShareableHandle(self, descriptor, kind):  # noqa: N802
        return OK, os.dup(descriptor)

    def cuMemRelease(self, handle):  # noqa: N802
        os.close(handle)
        return (OK,)

    def cuMemAddressReserve(self, length, *_):  # noqa: N802
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = self.libc.mmap(None, length, 0, flags, -1, 0)
        self.reserved[address] = length
        return OK, address

    def cuMemMap(self, address, length, offset, handle, flags):  # noqa: N802
        assert address not in self.mapped
        assert os.fstat(handle).st_size == length
        self._fixed(address, length, handle)
        self.mapped[address] = length
        return (OK,)

    def cuMemSetAccess(self, address, length, access, count):  # noqa: N802
        assert self.libc.mprotect(address, length, access[0].flags) == 0
        return (OK,)

    def cuMemUnmap(self, address, length):  # noqa: N802
        assert self.mapped.pop(address) == length
        self._fixed(address, length, -1)
        return (OK,)

    def cuMemAddressFree(self, address, length):  # noqa: N802
        assert address not in self.mapped
        assert self.reserved.pop(address) == length
        self.libc.munmap(address, length)
        return (OK,)


class Fake(Device):
    def __init__(self, driver):
        self.driver, self.index, self.uuid, self.granularity = driver, 0, "GPU-fake", 1 << 16
        self._handle_type = self._location = "fake"

    def create(self, length):
        return self.call("cuMemCreate", length, None, 0)

    def synchronize(self):
        pass


@pytest.fixture
def driver(monkeypatch):
    def as_tensor(mapping, offset, nbytes):
        memory = (ctypes.c_ubyte * nbytes).from_address(mapping.address + offset)
        memory.mapping = mapping
        return torch.frombuffer(memory, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)

    monkeypatch.setattr(cuda.CudaMapping, "tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made = Driver()
    yield made
    gc.collect()
    assert (made.mapped, made.reserved) == ({}, {})


@pytest.fixture
def load(driver, where, tmp_path, monkeypatch):
    """Load through gms as if the engine's memory were the device's."""

    class Stand(CudaBacking):
        def __init__(self, name):
            self._device, self.device = Fake(driver), "GPU-fake"

    monkeypatch.setattr("weights_gms.owner.backing_for", Stand)
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
    assert "wrote slot weights/GPU-fake/-/main/0of1" in " ".join(wrote.notes)
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
            import attrs

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


def test_segments_leave_nothing(driver):
    before = len(os.listdir("/proc/self/fd"))
    for private in (False, True):
        segment = CudaSegment.create(Fake(driver), 100_000, private=private)
        kept = segment.tensor(0, 8).fill_(5)
        other = CudaSegment.attach(Fake(driver), os.dup(segment.descriptor), 100_000, private=private)
        segment.seal(100_000)
        assert segment.fitted(1) == 2 << 16
        assert torch.equal(other.tensor(0, 8), kept)
        segment.close()
        other.close()
        del segment, other
        gc.collect()
        assert torch.all(kept == 5)
        del kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_call_that_fails_is_named(driver):
    driver.cuMemMap = lambda *_: ("bad address",)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaError, match="cuMemMap failed on cuda:0: bad address"):
        CudaSegment.create(Fake(driver), 10, private=False)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_the_bindings_the_error_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    info = w.EngineInfo(name="x", version="1", device="cuda:0")
    with pytest.raises(ExtraNotInstalledError, match=r"pip install 'weights-gms\[cuda\]'"):
        backing.backing_for(info)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", types.ModuleType("driver"))
    with pytest.raises(ArenaError, match=r"no CUDA device here to share memory of \(cuda:0\)"):
        Device("cuda:0")
