# SPDX-License-Identifier: Apache-2.0

import ctypes
import errno
import gc
import os
import subprocess
import sys

import pytest

from weights_parallel_shards import aio
from weights_parallel_shards.aio import Reads


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def buffers(count, size):
    made = [(ctypes.c_char * size)() for _ in range(count)]
    return made, [ctypes.addressof(one) for one in made]


def collect(reads, count):
    done = []
    while len(done) < count:
        if not (more := reads.done()):
            reads.wait()
        done += more
    return dict(done)


def test_every_read_comes_back_with_its_number_and_its_bytes(file):
    reads = Reads(8)
    made, addresses = buffers(8, 1000)
    for _ in range(20):
        for number, address in enumerate(addresses):
            reads.submit(number, file, address, 1000, number * 300)
        assert collect(reads, 8) == dict.fromkeys(range(8), 1000)
        for number, one in enumerate(made):
            assert one.raw == os.pread(file, 1000, number * 300)


def test_the_end_of_a_file_and_errors_are_results(file, tmp_path):
    reads = Reads(3)
    _, addresses = buffers(3, 1000)
    write_only = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    reads.submit(0, file, addresses[0], 1000, 64 * 256 - 10)
    reads.submit(1, write_only, addresses[1], 1000, 0)
    reads.submit(2, file, addresses[2], 1000, -5)
    assert collect(reads, 3) == {0: 10, 1: -errno.EBADF, 2: -errno.EINVAL}
    os.close(write_only)


def test_draining_waits_for_what_was_begun(file):
    reads = Reads(64)
    made, addresses = buffers(64, 4000)
    for number, address in enumerate(addresses):
        reads.submit(number, file, address, 4000, 0)
    reads.drain()
    assert reads.done() == []
    assert all(one.raw == made[0].raw != bytes(4000) for one in made)


def test_a_set_of_reads_that_is_dropped_is_drained(file):
    reads = Reads(64)
    made, addresses = buffers(64, 4000)
    for number, address in enumerate(addresses):
        reads.submit(number, file, address, 4000, 0)
    del reads
    gc.collect()
    assert all(one.raw == made[0].raw != bytes(4000) for one in made)


SCRIPT = """
import ctypes, os, sys
from weights_parallel_shards import aio
from weights_parallel_shards.aio import Reads
fd = os.open(sys.argv[1], os.O_RDONLY)
reads, memory = Reads(16), (ctypes.c_char * (16 << 20))()
for number in range(16):
    reads.submit(number, os.dup(fd), ctypes.addressof(memory) + (number << 20), 1 << 20, 0)
if sys.argv[2] == "fork" and (pid := os.fork()):
    assert os.waitpid(pid, 0)[1] == 0
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["exit", "fork"])
def test_a_process_ends_while_reads_are_under_way(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, how], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "end\n" * (2 if how == "fork" else 1)


def test_another_c_library_is_left_alone(monkeypatch):
    assert aio.is_available()
    monkeypatch.setattr(os, "confstr", lambda name: None)
    assert not aio.is_available()
