# SPDX-License-Identifier: Apache-2.0
"""Reading to a device that copies by itself, played by threads that copy late."""

import contextlib
import ctypes
import errno
import itertools
import os
import queue
import random
import threading
import time
import warnings

import pytest
import torch

from weights_core.checkpoint import find
from weights_core.errors import CheckpointError
from weights_core.shards import open_shards
from weights_core.tensors import as_bytes
from weights_core.testing import every_dtype, random_tensor, write_checkpoint
from weights_core.weightset import Target
from weights_parallel_shards import reader, storage
from weights_parallel_shards.aio import Reads
from weights_parallel_shards.chunks import Item
from weights_parallel_shards.reader import ParallelSet, channel_to
from weights_parallel_shards.tuning import Tuning

PATIENCE = 20


class FakeMark:
    def __init__(self):
        self.passed = threading.Event()

    def synchronize(self):
        assert self.passed.wait(PATIENCE)

    def query(self):
        return self.passed.is_set()


class FakeChannel:
    """Copies in a thread of its own, some time after it was told to."""

    def __init__(self, delay=0.002):
        self.delay = delay
        self.joined, self.allocated, self.followed = [], [], 0
        self.due = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        chance = random.Random(0)
        while (job := self.due.get()) is not None:
            if isinstance(job, FakeMark):
                job.passed.set()
            else:
                time.sleep(chance.random() * self.delay)
                job()

    def staging(self, nbytes):
        self.allocated.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy_bytes(self, to, source, size):
        self.due.put(lambda: ctypes.memmove(to, source, size))

    def copy(self, out, staged):
        self.due.put(lambda: out.copy_(staged))

    def mark(self):
        mark = FakeMark()
        self.due.put(mark)
        return mark

    def follow(self):
        self.followed += 1

    def join(self):
        self.joined.append(self.mark())

    def close(self):
        self.due.put(None)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def channel():
    with contextlib.closing(FakeChannel()) as channel:
        yield channel


def assorted():
    tensors = {f"dtype.{d}": random_tensor(4, 6, dtype=d, seed=i) for i, d in enumerate(every_dtype())}
    tensors |= {f"large{i}": random_tensor(100 + i, 100, seed=i) for i in range(8)}
    return {**tensors, "scalar": random_tensor(dtype="F32"), "empty": random_tensor(3, 0, 2)}


def set_of(folder, channel, *, readers=3, slots=5, chunk=8192):
    tuning = Tuning(readers=readers, chunk=chunk, slots=slots, window=1 << 20, inline=0)
    return ParallelSet(open_shards(find(folder)), tuning=tuning, channel_to=lambda _: channel)


def same(have, want):
    return torch.equal(as_bytes(have), as_bytes(want))


@pytest.mark.parametrize(("readers", "slots"), [(1, 1), (1, 2), (4, 4), (4, 9)])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_is_yielded_is_there_once_the_consumer_has_waited(tmp_path, slots, readers, kind):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=3, kind=kind)
    with (
        contextlib.closing(FakeChannel()) as channel,
        contextlib.closing(set_of(folder, channel, readers=readers, slots=slots)) as weights,
    ):
        targets = [Target(name, torch.zeros_like(t)) for name, t in tensors.items()]
        done = 0
        for target in weights.fill(targets):
            for mark in channel.joined:  # what the consumer's later work would wait for
                mark.synchronize()
            channel.joined.clear()
            assert same(target.out, tensors[target.name]), target.name
            done += 1
        assert done == len(tensors)


def test_slices_and_spread_out_destinations_arrive_too(tmp_path, channel):
    tensors = {f"t{i}": random_tensor(300, 200, seed=i) for i in range(6)}
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    with contextlib.closing(set_of(folder, channel)) as weights:
        columns = [Target(n, torch.zeros(300, 50), (slice(None), slice(50, 100))) for n in tensors]
        rows = [Target(n, torch.zeros(75, 200), (slice(75, 150),)) for n in tensors]
        turned = [Target(n, torch.zeros(200, 300).t()) for n in tensors]
        list(weights.fill([*columns, *rows, *turned]))
    for target in (*columns, *rows, *turned):
        want = tensors[target.name][target.slices] if target.slices else tensors[target.name]
        assert same(target.out, want)


def test_the_ring_is_allocated_once_and_follows_the_consumer(tmp_path, channel):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    with contextlib.closing(set_of(folder, channel, readers=2)) as weights:
        for _ in range(3):
            list(weights.fill([Target(name, torch.zeros_like(t)) for name, t in tensors.items()]))
    assert len(channel.allocated) == 1
    assert channel.followed == 3


@pytest.mark.parametrize("how", ["abandon", "close", "fail"])
def test_nothing_is_copied_any_more_after_the_end(tmp_path, channel, how, monkeypatch):
    tensors = {f"t{i}": random_tensor(64, 64, seed=i) for i in range(60)}
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    weights = set_of(folder, channel)
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

        done = Reads.done
        monkeypatch.setattr(Reads, "done", lambda self: [(number, -errno.EIO) for number, _ in done(self)])
        monkeypatch.setattr(storage, "preadv", preadv)
        with pytest.raises(CheckpointError, match="broken cable"):
            list(running)
    for target in targets:
        target.out.fill_(7)
    time.sleep(0.05)
    assert all(bool((target.out == 7).all()) for target in targets)
    weights.close()


def test_what_comes_in_short_is_read_again(tmp_path, channel, monkeypatch):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    done, turns = Reads.done, itertools.count()
    monkeypatch.setattr(
        Reads, "done", lambda self: [(n, got if next(turns) % 2 else got // 3) for n, got in done(self)]
    )
    with contextlib.closing(set_of(folder, channel)) as weights:
        targets = [Target(name, torch.zeros_like(t)) for name, t in tensors.items()]
        list(weights.fill(targets))
        for mark in channel.joined:
            mark.synchronize()
    assert all(same(target.out, tensors[target.name]) for target in targets)


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path, channel):
    tensors = {f"t{i}": random_tensor(64, 64, seed=i) for i in range(60)}
    folder = write_checkpoint(tmp_path, tensors, shards=1)
    with contextlib.closing(set_of(folder, channel)) as weights:
        running = weights.fill([Target(name, torch.zeros_like(t)) for name, t in tensors.items()])
        next(running)
        (file,) = folder.glob("*.safetensors")
        os.truncate(file, file.stat().st_size - 1000)
        with pytest.raises(CheckpointError) as caught:
            list(running)
    assert caught.value.file == file
    assert caught.value.tensor in tensors


def test_descriptors_are_few_and_closed_with_their_file(tmp_path, channel, monkeypatch):
    tensors = {f"t{i:02}": random_tensor(64, 64, seed=i) for i in range(60)}
    folder = write_checkpoint(tmp_path, tensors, shards=20)
    weights = set_of(folder, channel, readers=4, slots=6)
    most, submit = 0, Reads.submit

    def watched(self, *given):
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        submit(self, *given)

    monkeypatch.setattr(Reads, "submit", watched)
    before = len(os.listdir("/proc/self/fd"))
    list(weights.fill([Target(name, torch.zeros_like(t)) for name, t in tensors.items()]))
    after = len(os.listdir("/proc/self/fd"))
    weights.close()
    assert after - before <= 2 * 20  # each file may keep a direct one, and one without readahead
    assert most - before <= 2 * 20 + 6 * 4
    assert len(os.listdir("/proc/self/fd")) == before - 20


def test_where_no_descriptor_is_left_one_does(tmp_path, channel, monkeypatch):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=2)

    def dup(fd):
        raise OSError(errno.EMFILE, "Too many open files")

    with contextlib.closing(set_of(folder, channel)) as weights:
        monkeypatch.setattr(storage.os, "dup", dup)
        targets = [Target(name, torch.zeros_like(t)) for name, t in tensors.items()]
        list(weights.fill(targets))
        monkeypatch.undo()
        for mark in channel.joined:
            mark.synchronize()
    assert all(same(target.out, tensors[target.name]) for target in targets)


def test_passes_at_the_same_time_have_rings_of_their_own(tmp_path, channel):
    tensors = {f"t{i}": random_tensor(64, 64, seed=i) for i in range(30)}
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    with contextlib.closing(set_of(folder, channel)) as weights:
        targets = [[Target(n, torch.zeros_like(t)) for n, t in tensors.items()] for _ in range(2)]
        for _ in zip(weights.fill(targets[0]), weights.fill(targets[1]), strict=True):
            pass
        for mark in channel.joined:
            mark.synchronize()
    assert len(channel.allocated) == 2
    assert all(same(target.out, tensors[target.name]) for part in targets for target in part)


def test_a_consumer_in_a_forked_child_is_told(tmp_path, channel):
    tensors = {f"t{i}": random_tensor(64, 64, seed=i) for i in range(60)}
    folder = write_checkpoint(tmp_path, tensors, shards=3)
    with contextlib.closing(set_of(folder, channel)) as weights:
        running = weights.fill([Target(name, torch.zeros_like(t)) for name, t in tensors.items()])
        next(running)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
            pid = os.fork()
        if not pid:
            try:
                list(running)
            except CheckpointError as exc:
                os._exit(0 if "forked" in str(exc) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(list(running)) == len(tensors) - 1


def test_memory_that_is_not_the_hosts_is_never_written_by_address(tmp_path):
    tensors = assorted()
    folder = write_checkpoint(tmp_path, tensors, shards=1)
    with contextlib.closing(set_of(folder, None)) as weights:
        (shard,) = weights.shards
        for name, tensor in tensors.items():
            target, item = Target(name, torch.zeros_like(tensor)), Item(name, tensor.nbytes)
            pieces = list(reader._pieces(shard, target, item, 8192, by_address=False))
            assert item.address == 0
            assert all(piece.box is not None for piece in pieces)
            assert bool(pieces) == bool(tensor.nbytes)


def test_without_the_runtime_torch_copies(monkeypatch):
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", None)  # as on other vendors' devices
    assert channel_to(cuda) is None
    assert channel_to(torch.device("cpu")) is None
