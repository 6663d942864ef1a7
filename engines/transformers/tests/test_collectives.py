# SPDX-License-Identifier: Apache-2.0
"""What ranks make of one another before a collective call, in a group whose calls do nothing."""

from unittest.mock import create_autospec

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from weights_core.errors import CheckpointError, LoadFailed, RanksDisagreeError
from weights_transformers.collectives import Collectives
from weights_transformers.ranks import Ranks


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # its calls do nothing
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.fixture
def ranks():
    """Two ranks, of which the other says `other`, or the same as this one."""
    ranks = create_autospec(Ranks, instance=True)
    ranks.other = None
    ranks.ask.side_effect = lambda value, where: [value, ranks.other or value]
    return ranks


def asked(ranks):
    return [call.args[0] for call in ranks.ask.call_args_list]


def test_each_collective_call_is_agreed_on_and_nothing_else(mesh, ranks):
    tensor = torch.ones(2)
    with Collectives(ranks) as calls:
        tensor += 1
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        spread = DTensor.from_local(tensor, mesh, [Partial()]).redistribute(placements=[Replicate()])
        spread.to_local()
    calls.end(None)
    first, second, *inside, last = asked(ranks)
    assert (first, second) == (("at", "c10d.allreduce_.default"), ("at", "c10d.broadcast_.default"))
    assert ("at", "_c10d_functional.all_reduce.default") in inside
    assert last == ("done", "")


@pytest.mark.parametrize(
    ("other", "error", "why"),
    [
        (("failed", "no memory"), RanksDisagreeError, "rank 1 failed while Transformers loads: no memory"),
        (("passed", "gone"), LoadFailed, "rank 1 failed: gone"),
        (("done", ""), RanksDisagreeError, "rank 1 is done, this one at c10d.allreduce_"),
        (
            ("at", "c10d.barrier.default"),
            RanksDisagreeError,
            "rank 1 is at c10d.barrier.default, this one at",
        ),
        ("something else", RanksDisagreeError, "something else"),
    ],
)
def test_a_rank_that_is_not_there(mesh, ranks, other, error, why):
    ranks.other = other
    tensor = torch.ones(2)
    with Collectives(ranks) as calls:
        for _ in range(2):  # Transformers may catch what is raised, and go on
            with pytest.raises(error, match=why):
                dist.all_reduce(tensor)
    assert isinstance(calls.error, error)
    calls.end(calls.error)  # they all know
    assert len(asked(ranks)) == 1
    assert torch.equal(tensor, torch.ones(2))


def test_the_rank_that_failed_is_named_before_those_that_are_done(mesh, ranks):
    ranks.ask.side_effect = lambda value, where: [value, ("done", ""), ("failed", "no memory")]
    with Collectives(ranks), pytest.raises(RanksDisagreeError, match=r"rank 2 failed.*no memory"):
        dist.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("error", "kind"), [(CheckpointError("cut"), "failed"), (LoadFailed("cut", mutated=False), "passed")]
)
def test_how_a_rank_ended_is_told(ranks, error, kind):
    Collectives(ranks).end(error)
    assert asked(ranks) == [(kind, "cut")]


def test_ranks_that_are_lost_are_asked_once(mesh, ranks):
    ranks.ask.side_effect = RanksDisagreeError("nobody answers", lost=True)
    with Collectives(ranks) as calls, pytest.raises(RanksDisagreeError, match="nobody answers"):
        dist.all_reduce(torch.ones(2))
    calls.end(calls.error)
    assert len(asked(ranks)) == 1
