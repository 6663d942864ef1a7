# SPDX-License-Identifier: Apache-2.0

import copy
import io
import mmap
import os

import pytest
import torch

from weights_core import dtypes
from weights_core.tensors import LARGE, STAGE, as_bytes, empty, fill_through, stage_for
from weights_core.testing import every_dtype

PAGE = mmap.PAGESIZE


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (LARGE,), (3, LARGE // 2, 5)])
@pytest.mark.parametrize("offset", [None, 0, 8, 4096 + 728])
def test_is_an_ordinary_tensor(shape, offset):
    tensor = empty(shape, torch.bfloat16, offset=offset)
    plain = torch.empty(shape, dtype=torch.bfloat16)
    assert tensor.shape == plain.shape
    assert tensor.stride() == plain.stride()
    assert tensor.dtype == plain.dtype
    assert tensor.is_contiguous()
    assert tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
    assert tensor._base is None
    tensor.fill_(3)
    assert bool((tensor == 3).all())


@pytest.mark.parametrize("offset", [0, 8, 728, 4088, 123456 * 8])
def test_a_large_one_is_congruent_to_its_place_in_the_file(offset):
    assert empty((LARGE,), torch.float64, offset=offset).data_ptr() % PAGE == offset % PAGE


def test_elements_are_aligned_even_if_they_are_not_in_the_file():
    assert empty((LARGE,), torch.float64, offset=777).data_ptr() % 8 == 0
    assert empty((LARGE,), torch.uint8, offset=777).data_ptr() % PAGE == 777


@pytest.mark.parametrize("dtype", every_dtype())
def test_takes_every_dtype(dtype):
    tensor = empty((LARGE,), dtypes.to_torch(dtype), offset=64)
    assert tensor.dtype == dtypes.to_torch(dtype)


def test_can_be_saved_copied_shared_and_made_a_parameter():
    tensor = empty((LARGE,), torch.uint8, offset=100)
    tensor.random_(256)
    file = io.BytesIO()
    torch.save(tensor, file)
    assert file.tell() < LARGE + 5000
    file.seek(0)
    assert torch.equal(torch.load(file), tensor)
    assert torch.equal(copy.deepcopy(tensor), tensor)
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assert parameter.data_ptr() == tensor.data_ptr()
    want = tensor.clone()
    assert torch.equal(tensor.share_memory_(), want)


def test_memory_goes_back_with_the_last_view():
    size = 64 << 20
    before = resident()
    tensor = empty((size,), torch.uint8, offset=8)
    tensor.fill_(1)
    view = tensor[5:6]
    del tensor
    assert resident() > before + size // 2
    assert view[0] == 1
    del view
    assert resident() < before + size // 2


def test_memory_is_private_to_a_process():
    tensor = empty((LARGE,), torch.uint8)
    with open("/proc/self/maps") as maps:
        at = tensor.data_ptr()
        (line,) = [m for m in maps if int(m.split("-")[0], 16) <= at < int(m.split("-")[1].split()[0], 16)]
    assert line.split()[1] == "rw-p"
    assert os.path.basename(line.split()[-1]) != "zero"


def test_more_than_there_is_is_a_memory_error():
    with pytest.raises(MemoryError, match="no memory for a tensor of"):
        empty((1 << 60,), torch.uint8)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_filling_through_a_stage_brings_every_byte_once(size: int) -> None:
    data = torch.arange(size * 4, dtype=torch.uint8)
    asked: list[tuple[int, int]] = []

    def read(memory: torch.Tensor, begin: int) -> None:
        asked.append((begin, memory.numel()))
        memory.copy_(data[begin : begin + memory.numel()])

    out = torch.zeros(size, dtype=torch.float32)
    fill_through(torch.empty(12, dtype=torch.uint8), out, read)
    assert torch.equal(as_bytes(out), data)
    assert asked == [(begin, min(12, size * 4 - begin)) for begin in range(0, size * 4, 12)]


def test_a_stage_is_no_larger_than_what_it_is_for() -> None:
    assert stage_for(torch.empty(3, dtype=torch.int16)).numel() == 6
    assert stage_for(torch.empty(STAGE, dtype=torch.int16)).numel() == STAGE
    assert not stage_for(torch.empty(3)).is_pinned()
