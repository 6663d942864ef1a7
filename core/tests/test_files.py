# SPDX-License-Identifier: Apache-2.0
import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from weights_core.errors import CheckpointError
from weights_core.files import File

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.safetensors"
    path.write_bytes(CONTENT)
    return path


def descriptors(path):
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [link for link in links if os.path.realpath(link) == str(path)]


def test_reads_exactly_the_bytes_asked_for(path):
    file = File(path)
    assert file.size == len(CONTENT)
    assert file.read(5, 3) == CONTENT[3:8]
    assert file.read(0, 3) == b""
    assert file.read(len(CONTENT), 0) == CONTENT


def test_reads_into_memory_of_the_caller(path):
    out = bytearray(10)
    File(path).read_into(memoryview(out)[2:6], 100)
    assert out == b"\0\0" + CONTENT[100:104] + b"\0\0\0\0"


def test_its_descriptor_is_lent_until_it_is_closed(path):
    file = File(path)
    assert os.pread(file.fileno(), 3, 1) == CONTENT[1:4]
    file.close()
    with pytest.raises(CheckpointError, match="was closed"):
        file.fileno()


def test_threads_share_a_file(path):
    file = File(path)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda offset: file.read(7, offset), range(1000)))
    assert parts == [CONTENT[offset : offset + 7] for offset in range(1000)]


def test_short_reads_are_continued(path, mocker):
    real = os.preadv
    patched = mocker.patch("weights_core.files.os.preadv", autospec=True)
    patched.side_effect = lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset)
    assert File(path).read(10, 5) == CONTENT[5:15]
    assert [call.args[2] for call in patched.call_args_list] == [5, 8, 11, 14]


def test_an_io_error_names_the_file_and_the_byte_it_stopped_at(path, mocker):
    real = os.preadv

    def fail_at_eight(fd, buffers, offset):
        if offset >= 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, [buffers[0][: 8 - offset]], offset)

    mocker.patch("weights_core.files.os.preadv", autospec=True, side_effect=fail_at_eight)
    with pytest.raises(CheckpointError) as caught:
        File(path).read(10, 5)
    assert (caught.value.file, caught.value.offset) == (path, 8)
    assert str(caught.value) == f"{path}, byte 8: {os.strerror(errno.EIO)}"
    assert isinstance(caught.value.__cause__, OSError)


def test_reading_past_the_end_is_an_error(path):
    with pytest.raises(CheckpointError, match=f"{path}, byte {len(CONTENT)}: .*shorter"):
        File(path).read(4, len(CONTENT) - 2)


def test_a_file_truncated_after_opening_is_an_error(path):
    file = File(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=f"{path}, byte 100: .*shorter"):
        file.read(20, 90)


def test_a_replaced_file_is_read_as_it_was(path, tmp_path):
    file = File(path)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    os.rename(other, path)
    assert file.read(len(CONTENT), 0) == CONTENT
    file.check_unchanged()


def later(path):
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))


def append(path):
    found = os.stat(path)
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("change", [later, append])
def test_a_change_after_opening_is_found(path, change):
    file = File(path)
    file.check_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=f"{path}: .*changed while it was read"):
        file.check_unchanged()


def test_close_frees_the_descriptor_and_may_be_repeated(path):
    file = File(path)
    assert len(descriptors(path)) == 1
    file.close()
    file.close()
    assert descriptors(path) == []


def test_a_file_nobody_refers_to_is_closed(path):
    file = File(path)
    del file
    assert descriptors(path) == []


def test_a_file_is_not_inherited_by_child_processes(path):
    file = File(path)
    [link] = descriptors(path)
    assert not os.get_inheritable(int(link.rpartition("/")[2]))
    file.close()


def test_a_closed_file_never_reads_from_another_that_got_its_descriptor(path, tmp_path):
    file = File(path)
    file.close()
    other = tmp_path / "other"
    other.write_bytes(b"\x07" * len(CONTENT))
    taken = [File(other) for _ in range(64)]  # one of them has the number that was freed
    with pytest.raises(CheckpointError, match=f"{path}.*closed"):
        file.read(4, 0)
    with pytest.raises(CheckpointError, match=f"{path}.*closed"):
        file.check_unchanged()
    assert all(one.read(1, 0) == b"\x07" for one in taken)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/no.safetensors: No such file"):
        File(tmp_path / "no.safetensors")


def test_a_dangling_link_is_named(tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"{link}: No such file"):
        File(link)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path, make):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=f"{path}: is not a regular file"):
        File(path)
