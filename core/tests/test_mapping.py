# SPDX-License-Identifier: Apache-2.0

import ctypes
import mmap

import pytest
import torch

from weights_core.mapping import MappedFile
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
