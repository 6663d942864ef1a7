# SPDX-License-Identifier: Apache-2.0
"""Shared host memory: sealed under live tensors, owned by its views, and no writer left."""

import faulthandler
import fcntl
import gc
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from weights_core import machine, memory
from weights_core.errors import ArenaError
from weights_core.memory import HostSegment, check_room

SIZE = 3 * memory.PAGE + 10


def mappings():
    with open("/proc/self/maps") as maps:
        return sum("memfd:weights" in line for line in maps)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def filled(value=7, nbytes=SIZE, **options):
    segment = HostSegment.create(nbytes, **options)
    segment.tensor(0, nbytes).fill_(value)
    return segment


def exit_of(child):
    """Run `child` in a fork; return its exit code, or the negative signal."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        try:
            os._exit(child() or 0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_sealed_segment_keeps_its_tensors_and_refuses_every_write():
    segment = filled()
    tensor = segment.tensor(16, 100)
    assert not segment.sealed
    segment.seal(SIZE)
    assert segment.sealed
    segment.seal(SIZE)
    assert torch.all(tensor == 7)
    with pytest.raises(PermissionError):
        os.pwrite(os.open(f"/proc/self/fd/{segment.descriptor}", os.O_RDWR), b"x", 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(segment.descriptor, b"x", 0)


@pytest.mark.parametrize("attached", [False, True])
def test_a_write_to_a_sealed_view_is_trapped(attached):
    segment = filled()
    segment.seal(SIZE)
    if attached:
        segment = HostSegment.attach(os.dup(segment.descriptor), SIZE)
    tensor = segment.tensor(0, 8)
    assert exit_of(lambda: tensor.fill_(1) and 0) == -signal.SIGSEGV
    assert torch.all(tensor == 7)


def test_private_access_writes_into_copies_of_its_own():
    segment = filled(sealed_access="private")
    mine = segment.tensor(0, 8)
    segment.seal(SIZE)
    other = HostSegment.attach(os.dup(segment.descriptor), SIZE, "private").tensor(0, 8)
    mine.fill_(1)
    assert torch.all(other == 7)
    other.fill_(2)
    assert torch.all(mine == 1)
    assert torch.all(HostSegment.attach(os.dup(segment.descriptor), SIZE).tensor(0, 8) == 7)


def test_tensors_own_the_mapping_and_the_last_one_unmaps():
    before = mappings(), descriptors()
    segment = filled()
    kept = segment.tensor(memory.PAGE, 5)
    segment.close()
    segment.close()
    del segment
    gc.collect()
    assert torch.all(kept == 7)
    assert mappings() == before[0] + 1
    view = kept[2:]
    del kept
    assert torch.all(view == 7)
    del view
    gc.collect()
    assert (mappings(), descriptors()) == before


def test_a_thousand_segments_leave_nothing():
    before = mappings(), descriptors()
    for _ in range(500):
        segment = filled(nbytes=64)
        segment.seal(64)
        other = HostSegment.attach(os.dup(segment.descriptor), 64)
        assert other.tensor(0, 1).item() == 7
        segment.close()
        other.close()
    del segment, other
    gc.collect()
    assert (mappings(), descriptors()) == before


def test_a_child_does_not_keep_the_writer_from_sealing():
    segment = filled()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    try:
        segment.seal(SIZE)
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_child_reads_what_was_sealed_before_the_fork():
    segment = filled()
    segment.seal(SIZE)
    tensor = segment.tensor(0, 4)
    assert exit_of(lambda: 0 if tensor.sum().item() == 28 else 1) == 0


def test_a_child_reads_what_will_never_be_sealed():
    segment = filled()
    tensor = segment.tensor(0, 4)
    assert exit_of(lambda: tensor.sum().item() and 0) == -signal.SIGSEGV
    segment.close()
    assert exit_of(lambda: 0 if tensor.sum().item() == 28 else 1) == 0


def test_sealing_waits_for_no_one_who_maps_it_for_writing(monkeypatch):
    monkeypatch.setattr(memory, "_SEAL_ATTEMPTS", 2)
    segment = filled()
    again = memory.Mapping(segment._writable, SIZE, "write")
    with pytest.raises(ArenaError, match="cannot be sealed"):
        segment.seal(SIZE)
    del again
    segment.seal(SIZE)


def test_memory_that_is_not_sealed_or_too_small_is_refused_and_closed(tmp_path):
    (tmp_path / "plain").write_bytes(bytes(SIZE))
    before = descriptors()
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    half = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(half, memory._ADD_SEALS, memory._SHRINK)
    for descriptor in (unsealed, half, os.open(tmp_path / "plain", os.O_RDONLY), os.pipe()[0]):
        with pytest.raises(ArenaError, match="could still be changed"):
            HostSegment.attach(descriptor, SIZE)
    segment = filled()
    segment.seal(SIZE)
    with pytest.raises(ArenaError, match="the shared memory has"):
        HostSegment.attach(os.dup(segment.descriptor), 8 * memory.PAGE)
    segment.close()
    assert descriptors() == before + 1  # the other end of the pipe


def test_sleep_keeps_the_addresses_and_wake_brings_the_bytes_back():
    segment = filled()
    with pytest.raises(ArenaError, match="being filled"):
        segment.sleep()
    segment.seal(SIZE)
    tensor, other = segment.tensor(8, 4), filled(9)
    other.seal(SIZE)
    again = os.dup(segment.descriptor)
    segment.sleep()
    assert exit_of(lambda: tensor.sum().item() and 0) == -signal.SIGSEGV
    with pytest.raises(ArenaError, match="could still be changed"):
        segment.wake(os.open(os.devnull, os.O_RDONLY), SIZE)
    segment.wake(again, SIZE)
    assert torch.all(tensor == 7)
    segment.close()
    assert torch.all(tensor == 7)


def test_bytes_outside_are_refused():
    segment = filled()
    for offset, nbytes in ((-1, 4), (0, 1 << 20), (1 << 20, 0)):
        with pytest.raises(ValueError, match="are not in a mapping"):
            segment.tensor(offset, nbytes)
    assert segment.tensor(4, 0).numel() == 0


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (resource.RLIMIT_FSIZE, "ulimit -f"),
        (resource.RLIMIT_NOFILE, "ulimit -n"),
        (resource.RLIMIT_AS, "mapped"),
    ],
)
def test_limits_are_named(limit, says):
    code = f"""
import os, resource
from weights_core.errors import ArenaError
from weights_core.memory import HostSegment
resource.setrlimit({limit}, ({{{resource.RLIMIT_NOFILE}: 3}}.get({limit}, 1 << 20),) * 2)
try:
    HostSegment.create(1 << 34)
except ArenaError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert says in done.stdout, done


def test_room_is_looked_at_before_memory_is_filled(monkeypatch):
    monkeypatch.setattr(memory, "memory_available", lambda: 5 * 10**9)
    check_room(4 * 10**9)
    with pytest.raises(ArenaError, match=r"6.00 GB of host memory are needed, and 5.00 GB are available"):
        check_room(6 * 10**9)


def test_available_memory_knows_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_SYS", tmp_path / "sys")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000 kB\n")
    assert machine.memory_available() == 4000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    group = tmp_path / "sys/fs/cgroup/a"
    (group / "b").mkdir(parents=True)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 1\nactive_file 200000\ninactive_file 50000\nshmem 7\n")
    (group / "b/memory.max").write_text("max\n")
    assert machine.memory_available() == 350_000
    (group / "memory.max").write_text("600000\n")
    assert machine.memory_available() == 0
