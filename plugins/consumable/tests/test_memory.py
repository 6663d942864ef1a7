# SPDX-License-Identifier: Apache-2.0

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from weights_consumable.memory import SMALL, Lender
from weights_core.meter import rss

MIB = 1 << 20
TINY, MEDIUM = SMALL


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, TINY, TINY + 1, MEDIUM, MEDIUM + 1, 5 * MIB + 3])
def test_lends_memory_that_is_the_tensors_alone(nbytes):
    lender = Lender()
    first, second = lender.lend(nbytes), lender.lend(nbytes)
    assert (first.dtype, first.shape) == (torch.uint8, (nbytes,))
    assert first.untyped_storage().nbytes() == nbytes
    first.fill_(1)
    second.fill_(2)
    assert torch.all(first == 1)
    assert nbytes == 0 or first.data_ptr() % 64 == 0


@pytest.mark.parametrize("nbytes", [8 * MIB, 100_000, 10_000])
def test_memory_is_back_with_the_system_when_the_last_view_dies(nbytes):
    lender, count = Lender(), 64 * MIB // nbytes
    tensors = [lender.lend(nbytes).fill_(1) for _ in range(count)]  # objects take room of their own
    tensors.clear()
    lender.close()
    before = rss()
    tensors = [lender.lend(nbytes).fill_(1) for _ in range(count)]
    assert rss() - before > 60 * MIB
    view = tensors[-1][5:7]
    tensors.clear()
    lender.trim()
    assert rss() - before < 12 * MIB  # at most what one view pins: its own mapping or a shared one
    assert view.tolist() == [1, 1]
    del view
    lender.trim()
    assert rss() - before < 3 * MIB  # an eighth of a mapping, rounded up to a huge page


@pytest.mark.parametrize("nbytes", [MEDIUM, TINY])
def test_what_is_kept_for_the_next_tensor_is_little_and_goes_when_closed(nbytes):
    lender = Lender()
    first = lender.lend(nbytes).fill_(1)
    place = first.data_ptr()
    del first
    lender.trim()
    again = lender.lend(nbytes)
    assert again.data_ptr() == place  # on the same pages
    lender.close()
    assert torch.all(again == 1)
    assert lender.lend(nbytes).data_ptr() != place


def test_only_what_lies_behind_the_last_that_lives_is_lent_again():
    lender = Lender()
    tensors = [lender.lend(64).fill_(n) for n in range(4)]
    del tensors[3], tensors[1]
    lent = [lender.lend(64).fill_(9) for _ in range(3)]
    assert lent[0].data_ptr() - tensors[0].data_ptr() == 3 * 64
    assert [int(tensor[0]) for tensor in tensors] == [0, 2]
    assert len({tensor.data_ptr() for tensor in (*tensors, *lent)}) == 5


def test_a_kept_scale_does_not_hold_the_room_of_weights():
    lender = Lender()
    before = rss()
    kept, weights = [], []
    for _ in range(400):
        kept.append(lender.lend(16).fill_(3))
        weights.append(lender.lend(200_000).fill_(1))
    weights.clear()
    lender.trim()
    assert rss() - before < 4 * MIB
    assert all(torch.all(tensor == 3) for tensor in kept)


def test_trimming_goes_on_with_a_mapping_that_is_in_use():
    lender = Lender()
    kept = lender.lend(8).fill_(7)
    lender.trim()
    after = lender.lend(8).fill_(9)
    assert after.data_ptr() - kept.data_ptr() == 64
    assert kept.tolist() == [7] * 8


def test_threads_never_get_the_same_memory():
    lender, begin = Lender(), threading.Barrier(4)

    def work(number):
        begin.wait(20)
        mine = []
        for count in range(2000):
            mine.append(lender.lend(40).fill_(number))
            if count % 50 == 0:
                lender.trim()
        return mine

    with ThreadPoolExecutor(4) as pool:
        for number, mine in enumerate(pool.map(work, range(4), timeout=60)):
            assert all(torch.all(tensor == number) for tensor in mine)


def test_a_forked_child_has_its_own_copy():
    lender = Lender()
    tensor = lender.lend(4096).fill_(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # numpy, not torch: its threads do not survive a fork
        seen = tensor.numpy()[0]
        tensor.numpy()[:] = 9
        os.write(write, bytes([seen]))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 1) == b"\x01"
    os.close(read)
    assert torch.all(tensor == 1)


def test_a_kernel_without_huge_pages_will_do(monkeypatch):
    class Without(mmap.mmap):
        def madvise(self, *given):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Without)
    assert torch.all(Lender().lend(4 * MIB).fill_(1) == 1)
