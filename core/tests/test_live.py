# SPDX-License-Identifier: Apache-2.0
"""What is shared already is found by its addresses, and becomes part of an arena without being moved."""

import gc
import os

import torch

from weights_core import Layout, live
from weights_core.arena import ArenaWriter
from weights_core.memory import HUGE, HostSegment, Mapping, collapse


def sealed(nbytes, access="read"):
    made = HostSegment.create(nbytes, access)
    made.tensor(0, nbytes).fill_(3)
    made.seal(nbytes)
    return made


def test_a_segment_is_found_as_long_as_it_can_be_handed_on():
    one, other = sealed(5000), sealed(100)
    filling = HostSegment.create(100)
    inside = [one.address + 4999, one.address, filling.address]
    assert live.holding(inside) == [one]
    assert {id(s) for s in live.holding([*inside, other.address])} == {id(one), id(other)}
    assert live.holding([one.address + 5000, one.address - 1]) == []
    address = other.address
    other.close()
    assert live.holding([address]) == []
    again = one.again()
    one.close()
    assert live.holding(inside) == [again]
    again.close()
    del one, again
    gc.collect()
    assert live.holding(inside) == []
    filling.close()


def test_who_may_have_written_copies_of_its_own_is_not_settled():
    read, private = sealed(100), sealed(100, "private")
    assert (read.is_settled, private.is_settled) == (True, False)
    for segment in (read, private):
        segment.close()


def test_an_arena_takes_in_what_is_shared_already():
    shared = sealed(4096)
    there, elsewhere = shared.tensor(256, 1000), torch.arange(10)
    writer = ArenaWriter(HostSegment.create, 1 << 20, [shared.again()])
    tensors = {"there": there, "elsewhere": elsewhere}
    before = there.data_ptr()
    assert writer.move(tensors) < 1000
    assert there.data_ptr() == before
    manifest = writer.manifest(tensors, Layout.SHARDED)
    assert [manifest.places[name].segment for name in tensors] == [0, 1]
    assert manifest.places["there"].offset == 256
    writer.seal()
    assert torch.equal(elsewhere, torch.arange(10))
    writer.close()
    assert os.fstat(shared.descriptor).st_size == 4096  # the owner's is the owner's
    shared.close()


def test_huge_pages_are_asked_for_where_they_fit():
    small, large = sealed(1000), sealed(3 * HUGE)
    assert not collapse(small.address, 1000)
    assert large.address % HUGE == 0
    again = Mapping(large.descriptor, 3 * HUGE, "read")
    assert again.address % HUGE == 0
    collapse(again.address, 3 * HUGE)  # kernels differ in whether they do
    assert bool((again.tensor(0, 3 * HUGE) == 3).all())
    assert bool((large.tensor(0, 3 * HUGE) == 3).all())
    for segment in (small, large):
        segment.close()
