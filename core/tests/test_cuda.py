# SPDX-License-Identifier: Apache-2.0
"""The logic of device segments on a stand-in of the driver whose memory is the host's.

What the real driver does is tested on a GPU, by tests/gpu.
"""

import gc
import os
import sys
import types

import pytest
import torch

import weights_core as w
from weights_core import backing
from weights_core.cuda import CudaSegment, Device
from weights_core.errors import ArenaError, ExtraNotInstalledError
from weights_core.testing.device import HostDevice, HostDriver


@pytest.fixture
def driver():
    made = HostDriver()
    yield made
    gc.collect()
    assert (made.mapped, made.reserved) == ({}, {})


def test_segments_leave_nothing(driver):
    before = len(os.listdir("/proc/self/fd"))
    for private in (False, True):
        segment = CudaSegment.create(HostDevice(driver), 100_000, private=private)
        kept = segment.tensor(0, 8).fill_(5)
        other = CudaSegment.attach(HostDevice(driver), os.dup(segment.descriptor), 100_000, private=private)
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
        CudaSegment.create(HostDevice(driver), 10, private=False)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_the_bindings_the_error_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    info = w.EngineInfo(name="x", version="1", device="cuda:0")
    with pytest.raises(ExtraNotInstalledError, match=r"pip install 'weights-core\[cuda\]'"):
        backing.backing_for(info)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", types.ModuleType("driver"))
    with pytest.raises(ArenaError, match=r"no CUDA device here to share memory of \(cuda:0\)"):
        Device("cuda:0")


def test_memory_is_taken_away_only_when_the_device_is_done(driver):
    device = HostDevice(driver)
    segment = CudaSegment.create(device, 100, private=False)
    tensor = segment.tensor(0, 8)
    del segment
    gc.collect()
    assert device.waits == 0
    del tensor
    gc.collect()
    assert device.waits == 1
    segment = CudaSegment.create(device, 100, private=False)
    segment.sleep()
    assert device.waits == 2
