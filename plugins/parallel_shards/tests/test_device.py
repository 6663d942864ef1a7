# SPDX-License-Identifier: Apache-2.0
"""Reading to a device that copies by itself, played by threads that copy late."""

import contextlib
import queue
import random
import threading
import time

import attrs
import pytest
import torch

from weights_core.checkpoint import find
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes
from weights_core.testing import every_dtype, random_tensor, write_checkpoint
from weights_core.weightset import Target
from weights_parallel_shards import storage
from weights_parallel_shards.reader import ParallelSet
from weights_parallel_shards.tuning import Tuning

PATIENCE = 20


@attrs.frozen(eq=False)
class FakeMark:
    device: "FakeDevice"
    passed: threading.Event = attrs.field(factory=threading.Event)

    def synchronize(self):
        assert self.passed.wait(PATIENCE)

    def join(self):
        self.device.joined.append(self)


class FakeChannel:
    """Copies in a thread of its own, some time after it was told to."""

    def __init__(self, device):
        self.device = device
        self.due = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        chance = random.Random(0)
        while (job := self.due.get()) is not None:
            if isinstance(job, FakeMark):
                job.passed.set()
            else:
                time.sleep(chance.random() * self.device.delay)
                out, source = job
                out.copy_(source)

    def copy(self, parts):
        self.device.threads.add(threading.current_thread())
        for out, source in parts:
            self.due.put((out, source))
        mark = FakeMark(self.device)
        self.due.put(mark)
        return mark

    def follow(self):
        self.device.followed += 1


class FakeDevice:
    def __init__(self, delay=0.002):
        self.delay = delay
        self.channels, self.joined, self.allocated, self.followed = [], [], [], 0
        self.threads = set()

    def host_memory(self, nbytes):
        self.allocated.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def channel(self):
        self.channels.append(FakeChannel(self))
        return self.channels[-1]

    def close(self):
        for channel in self.channels:
            channel.due.put(None)
            channel.thread.join(PATIENCE)
            assert not channel.thread.is_alive()


@pytest.fixture
def device():
    with contextlib.closing(FakeDevice()) as device:
        yield device


def assorted():
    tensors = {f"dtype.{d}": random_tensor(4, 6, dtype=d, seed=i) for i, d in enumerate(every_dtype())}
    tensors |= {f"large{i}": random_tensor(100 + i, 100, seed=i) for i in range(8)}
    return {**tensors, "scalar": random_tensor(dtype="F32"), "empty": random_tensor(3, 0, 2)}


def set_of(folder, device, *, readers=3, slots=2, chunk=8192):
    tuning = Tuning(readers=readers, chunk=chunk, slots=slots, window=1 << 20, inline=0)
    return ParallelSet(open_shards(find(folder)), tuning=tuning, device_of=lambda _: device)


def same(have, want):
    return torch.equal(as_bytes(have), as_bytes(want))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_is_yielded_is_there_once_the_consumer_has_waited(tmp_path, device, slots, readers, kind):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=3, kind=kind)
    with contextlib.closing(set_of(folder, device, readers=readers, slots=slots)) as weights:
        targets = [Target(name, torch.zeros_like(t)) for name, t in tensors.items()]
        done = 0
        for target in weights.fill(targets):
            for mark in device.joined:  # what the consumer's later work would wait for
                mark.synchronize()
            device.joined.clear()
            assert same(target.out, tensors[target.name]), target.name
            done += 1
        assert done == len(tensors)
    assert device.threads <= {threading.current_thread()}  # many would wait for each other in a driver


def test_slices_and_spread_out_destinations_arrive_too(tmp_path, device):
    tensors = {f"t{i}": random_tensor(300, 200, seed=i) for i in range(6)}
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    with contextlib.closing(set_of(folder, device)) as weights:
        columns = [Target(n, torch.zeros(300, 50), (slice(None), slice(50, 100))) for n in tensors]
        rows = [Target(n, torch.zeros(75, 200), (slice(75, 150),)) for n in tensors]
        turned = [Target(n, torch.zeros(200, 300).t()) for n in tensors]
        list(weights.fill([*columns, *rows, *turned]))
    for target in (*columns, *rows, *turned):
        want = tensors[target.name][target.slices] if target.slices else tensors[target.name]
        assert same(target.out, want)


def test_the_ring_is_allocated_once_and_follows_the_consumer(tmp_path, device):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    with contextlib.closing(set_of(folder, device, readers=2)) as weights:
        for _ in range(3):
            list(weights.fill([Target(name, torch.zeros_like(t)) for name, t in tensors.items()]))
    assert len(device.allocated) == len(device.channels) == 1
    assert device.followed == 3


@pytest.mark.parametrize("how", ["abandon", "close", "fail"])
def test_nothing_is_copied_any_more_after_the_end(tmp_path, device, how, monkeypatch):
    tensors = {f"t{i}": random_tensor(64, 64, seed=i) for i in range(60)}
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    weights = set_of(folder, device)
    targets = [Target(name, torch.zeros_like(t)) for name, t in tensors.items()]
    running = weights.fill(targets)
    next(running)
    if how == "abandon":
        running.close()
    elif how == "close":
        weights.close()
    else:

        def preadv(fd, buffers, offset):
            raise OSError("broken cable")

        monkeypatch.setattr(storage, "preadv", preadv)
        with pytest.raises(CheckpointError, match="broken cable"):
            list(running)
    for target in targets:
        target.out.fill_(7)
    time.sleep(0.05)
    assert all(bool((target.out == 7).all()) for target in targets)
    weights.close()
