# SPDX-License-Identifier: Apache-2.0

import errno
import mmap
import os

import pytest

from weights_core.errors import CheckpointError
from weights_core.files import File
from weights_parallel_shards import storage as module
from weights_parallel_shards.storage import ReadError, Storage, Way, memory

SIZE = 3 * 1024 * 1024 + 123
PAGE = mmap.PAGESIZE


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


@pytest.fixture
def opened(path):
    made = []

    def make(direct="auto"):
        made.append(Storage(File(path), direct))
        return made[-1]

    yield make
    for storage in made:
        storage.close()
        storage.close()
        storage.file.close()
    assert [e for e in os.listdir("/proc/self/fd") if _leads_to(e, path)] == []


def _leads_to(entry, path):
    try:
        return os.readlink(f"/proc/self/fd/{entry}") == str(path)
    except FileNotFoundError:
        return False


@pytest.fixture
def room():
    """Aligned memory and its address."""
    import torch

    raw = torch.zeros(SIZE + 3 * PAGE, dtype=torch.uint8)
    skip = -raw.data_ptr() % PAGE
    view = raw[skip:]
    return view, view.data_ptr()


def evict(path):
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident(path):
    """Pages of a file in the cache, or None where the kernel can't tell."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return module._cached_pages(fd, 0, SIZE)
    finally:
        os.close(fd)


def has_direct_io(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def whole(way):
    return -(-SIZE // way.align) * way.align


def read_all(storage, way, room):
    view, address = room
    storage.read(way, [(address, whole(way))], 0, SIZE)
    return bytes(view[:SIZE].numpy())


@pytest.mark.parametrize("direct", ["auto", "always", "never"])
@pytest.mark.parametrize("cached", [True, False])
def test_every_way_reads_the_same_bytes(path, opened, room, direct, cached):
    want = path.read_bytes()
    if not cached:
        evict(path)
    storage = opened(direct)
    if direct == "always" and not has_direct_io(path):
        with pytest.raises(CheckpointError, match="no direct I/O"):
            storage.way(0, SIZE)
        return
    assert read_all(storage, storage.way(0, SIZE), room) == want


def test_what_is_cached_is_read_from_the_cache_and_what_is_not_directly(path, opened):
    path.read_bytes()
    assert opened().way(0, SIZE).align == 1
    evict(path)
    if resident(path) != 0 or not has_direct_io(path):
        pytest.skip("the file system keeps its pages, or has no direct I/O")
    assert opened().way(0, SIZE).align == module.ALIGNMENT
    assert opened("never").way(0, SIZE).align == 1


def test_without_the_kernels_count_one_page_is_asked_for(path, opened, monkeypatch):
    counted = module._cached_pages
    path.read_bytes()
    evict(path)
    if resident(path) != 0 or not has_direct_io(path):
        pytest.skip("the file system keeps its pages, or has no direct I/O")
    monkeypatch.setattr(module, "_cached_pages", lambda *_: None)

    def asked_when_not_cached():
        evict(path)
        return opened().way(0, SIZE).align

    # to ask begins to read the page, and a fast disk may have brought it by the time of the answer
    assert module.ALIGNMENT in {asked_when_not_cached() for _ in range(20)}
    path.read_bytes()
    assert opened().way(0, SIZE).align == 1
    evict(path)
    opened().way(0, SIZE)
    fd = os.open(path, os.O_RDONLY)
    assert counted(fd, 0, SIZE) <= 4  # a page, or a small folio of them
    os.close(fd)


def without_direct_io(monkeypatch):
    plain = os.open

    def refuse(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)


def test_without_direct_io_what_only_we_brought_in_is_dropped(path, opened, room, monkeypatch):
    evict(path)
    if resident(path) != 0:
        pytest.skip("the file system keeps its pages, or the kernel does not count them")
    without_direct_io(monkeypatch)
    storage = opened()
    way = storage.way(0, SIZE)
    assert way.align == 1
    assert way.drop
    read_all(storage, way, room)
    assert resident(path) == 0
    assert read_all(storage, way, room) == path.read_bytes()


@pytest.mark.parametrize("cached", [(0, PAGE), (SIZE // 2, PAGE), (SIZE - PAGE, PAGE)])
def test_without_direct_io_what_was_cached_before_stays(path, opened, room, monkeypatch, cached):
    evict(path)
    if resident(path) != 0:
        pytest.skip("the file system keeps its pages, or the kernel does not count them")
    without_direct_io(monkeypatch)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, cached[1], cached[0])
    os.close(fd)
    before = resident(path)
    assert before
    storage = opened()
    read_all(storage, storage.way(0, SIZE), room)
    assert resident(path) >= before


def test_never_leaves_the_cache_as_the_kernel_has_it(path, opened, room):
    evict(path)
    storage = opened("never")
    read_all(storage, storage.way(0, SIZE), room)
    assert resident(path) in (None, -(-SIZE // PAGE))


def test_direct_reads_that_the_file_system_refuses_after_all_go_on_buffered(path, opened, room, monkeypatch):
    plain, direct_fds = module.preadv, []

    def preadv(fd, buffers, offset):
        if fd != storage.file.fileno():
            direct_fds.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(fd, buffers, offset)

    evict(path)
    storage = opened()
    way = storage.way(0, SIZE)
    if way.align == 1:
        pytest.skip("the file system keeps its pages, or has no direct I/O")
    monkeypatch.setattr(module, "preadv", preadv)
    assert read_all(storage, way, room) == path.read_bytes()
    assert len(direct_fds) == 1
    evict(path)
    assert storage.way(0, SIZE).align == 1


@pytest.mark.parametrize("direct", ["always", "never"])
@pytest.mark.parametrize("at_most", [1000, 4096, 100_000])
def test_short_reads_are_continued(path, opened, room, monkeypatch, direct, at_most):
    if not has_direct_io(path):
        pytest.skip("no direct I/O here")
    plain = module.preadv

    def preadv(fd, buffers, offset):
        if fd != storage.file.fileno():
            at = max(at_most // PAGE, 1) * PAGE
            return plain(fd, [buffers[0][:at]], offset)
        return plain(fd, [buffers[0][:at_most]], offset)

    storage = opened(direct)
    monkeypatch.setattr(module, "preadv", preadv)
    view, address = room
    way = storage.way(0, SIZE)
    parts = [(address, 2 * PAGE), (address + 2 * PAGE, whole(way) - 2 * PAGE)]
    storage.read(way, parts, 0, SIZE)
    assert bytes(view[:SIZE].numpy()) == path.read_bytes()


def test_the_end_of_a_file_needs_no_whole_block(path, opened, room):
    if not has_direct_io(path):
        pytest.skip("no direct I/O here")
    storage = opened("always")
    begin = SIZE // PAGE * PAGE
    view, address = room
    storage.read(storage.way(SIZE - 5, SIZE), [(address, PAGE)], begin, SIZE)
    assert bytes(view[: SIZE - begin].numpy()) == path.read_bytes()[begin:]


@pytest.mark.parametrize("direct", ["always", "never"])
def test_a_file_that_ends_early_is_an_error_at_the_byte(path, opened, room, direct):
    if not has_direct_io(path):
        pytest.skip("no direct I/O here")
    storage = opened(direct)
    way = storage.way(0, SIZE)
    os.truncate(path, SIZE - 10_000)
    with pytest.raises(ReadError, match="became shorter") as caught:
        read_all(storage, way, room)
    assert caught.value.offset == SIZE - 10_000


def test_an_error_of_the_device_is_an_error_at_the_byte(path, opened, room, monkeypatch):
    def preadv(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "preadv", preadv)
    with pytest.raises(ReadError, match="Input/output error") as caught:
        opened().read(Way(0), [(room[1], 100)], 77, 177)
    assert caught.value.offset == 77


def test_a_second_descriptor_is_the_same_file_even_if_its_path_is_anothers(path, opened, room):
    want = path.read_bytes()
    storage = opened("always" if has_direct_io(path) else "never")
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    os.replace(other, path)
    assert read_all(storage, storage.way(0, SIZE), room) == want


def test_without_a_descriptor_to_spare_reading_goes_on_through_the_cache(path, opened, room, monkeypatch):
    want = path.read_bytes()
    evict(path)
    storage = opened()

    def refuse(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        way = storage.way(0, SIZE)
        assert way.fd == storage.file.fileno()
    assert read_all(storage, way, room) == want


def test_memory_is_what_lies_at_an_address():
    import torch

    raw = torch.arange(100, dtype=torch.uint8)
    view = memory(raw.data_ptr() + 10, 5)
    assert bytes(view) == bytes(range(10, 15))
    view[:] = b"abcde"
    assert bytes(raw[9:16].numpy()) == b"\x09abcde\x0f"
