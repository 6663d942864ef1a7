# SPDX-License-Identifier: Apache-2.0

import ctypes
import gc
import mmap
import os

import pytest
import torch

from weights_core import mapping
from weights_core.errors import CheckpointError
from weights_core.files import File
from weights_core.mapping import FilePages, MappedFile
from weights_core.meter import rss

MIB = 1 << 20
PAGE = mmap.PAGESIZE


@pytest.fixture
def mapped(tmp_path):
    """A file of 8 MiB with a space in its name, and a tensor that is a private mapping of it."""
    path = tmp_path / "some weights.bin"
    path.write_bytes(bytes(range(256)) * (8 * MIB // 256))
    tensor = torch.from_file(str(path), shared=False, size=8 * MIB, dtype=torch.uint8)
    return path, tensor


def test_pages_of_a_mapped_file_go_back_and_come_again(mapped):
    path, tensor = mapped
    torch.zeros(8 * MIB, dtype=torch.uint8).sum()  # whose first call takes memory of its own
    before = rss()
    total = int(tensor.sum())
    assert rss() - before > 7 * MIB
    MappedFile(path).drop(tensor.data_ptr(), 8 * MIB)
    assert rss() - before < 2 * MIB
    assert int(tensor.sum()) == total


def test_only_whole_pages_go_back(mapped):
    path, tensor = mapped
    tensor[:1] = 99  # written pages would lose what was written
    tensor[4 * PAGE - 1 : 4 * PAGE] = 99
    MappedFile(path).drop(tensor.data_ptr() + 1, 4 * PAGE - 2)
    MappedFile(path).drop(tensor.data_ptr() + 5, 7)
    assert tensor[0] == tensor[4 * PAGE - 1] == 99


def test_memory_that_is_not_the_files_is_left_alone(mapped):
    path, tensor = mapped
    other = torch.full((MIB,), 7, dtype=torch.uint8)
    found = MappedFile(path)
    found.drop(other.data_ptr(), MIB)
    found.drop(tensor.data_ptr(), 8 * MIB + PAGE)
    assert torch.all(other == 7)


def test_a_file_that_is_not_mapped_has_nothing_to_give(tmp_path):
    buffer = ctypes.create_string_buffer(b"kept", 4 * PAGE)
    MappedFile(tmp_path / "nothing").drop(ctypes.addressof(buffer), 4 * PAGE)
    assert buffer.value == b"kept"


# Files that are mapped by us ----------------------------------------------------------------------

RAW = bytes(range(256)) * (8 * MIB // 256)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(RAW)
    found = File(path)
    yield found
    found.close()


def place(tensor):
    """What the kernel says of the mapping that a tensor lies in: its path, and whether it is private."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, flags, _, _, _, *path = line.split(maxsplit=5)
            begin, end = (int(one, 16) for one in addresses.split("-"))
            if begin <= tensor.data_ptr() < end:
                return "".join(path).strip(), flags
    raise AssertionError("nowhere")


def test_a_tensor_lies_in_the_files_pages_all_of_which_are_there(file):
    before = rss()
    tensor = FilePages(file).tensor(5, 6 * MIB)
    assert rss() - before > 5 * MIB
    assert place(tensor) == (str(file.path), "rw-p")
    assert tensor.numpy().tobytes() == RAW[5 : 5 + 6 * MIB]


def test_it_outlives_the_pages_and_the_file_and_gives_its_memory_back_when_it_dies(file):
    pages = FilePages(file)
    tensor, other = pages.tensor(0, 4 * MIB), pages.tensor(4 * MIB, 2 * MIB)
    tensor.fill_(7)
    del pages
    file.close()
    gc.collect()
    view = tensor[3 * MIB :]
    del tensor
    assert int(view.min()) == 7
    before = rss()
    del view
    assert before - rss() > 3 * MIB  # though the other lives in the same mapping
    assert other.numpy().tobytes() == RAW[4 * MIB : 6 * MIB]
    assert place(other) == (str(file.path), "rw-p")
    at = other.data_ptr()
    del other
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert f"{at - 4 * MIB:x}-" not in maps.read()


def test_what_is_written_is_seen_by_nobody_else(file):
    pages = FilePages(file)
    tensor, neighbour = pages.tensor(0, PAGE + 10), pages.tensor(PAGE + 10, PAGE)
    tensor.fill_(7)
    assert neighbour.numpy().tobytes() == RAW[PAGE + 10 : 2 * PAGE + 10]
    del tensor
    assert neighbour.numpy().tobytes() == RAW[PAGE + 10 : 2 * PAGE + 10]
    assert file.path.read_bytes() == RAW


def test_a_kernel_that_cannot_bring_pages_in_maps_nothing(file, monkeypatch):
    monkeypatch.setattr(mapping, "_POPULATE_READ", 9999)
    assert FilePages(file).tensor(0, PAGE) is None


@pytest.mark.parametrize("left", [0, 3 * MIB + 17])
def test_a_file_that_was_cut_short_is_an_error(file, left):
    pages = FilePages(file)
    os.truncate(file.path, left)
    with pytest.raises(CheckpointError, match=rf"{file.path}.*(shorter|was changed)"):
        pages.tensor(PAGE, 4 * MIB)


def test_a_file_that_was_changed_is_an_error(file):
    pages = FilePages(file)
    found = os.stat(file.path)
    os.utime(file.path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        pages.tensor(0, PAGE)
