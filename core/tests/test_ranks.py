# SPDX-License-Identifier: Apache-2.0
"""Several ranks take the same path through the providers, or none of them goes on."""

import pytest
import torch
from torch import nn

import weights_core as w
from weights_core import errors
from weights_core.ranks import gather
from weights_core.testing import Group, host_of, write_checkpoint

SIZE = 2


class FromDict(w.WeightSet):
    def __init__(self, tensors, fail=None, in_place=False):
        self.tensors, self.fail, self.in_place = tensors, fail, in_place
        self.provider = "peer"

    @property
    def metas(self):
        return {n: w.TensorMeta(n, tuple(t.shape), "F32", t.numel() * 4) for n, t in self.tensors.items()}

    def read(self, name, slices=None):
        if self.fail:
            raise self.fail
        return self.tensors[name]


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", nn.Linear(3, 2).state_dict())


def wrong_tensors():
    return {"weight": torch.full((2, 3), 7.0), "bias": torch.full((2,), 7.0)}


def peer(behave):
    """A source that does `behave[rank]`: raise it, or provide other bytes than the disk's."""

    class Peer:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.SOURCE}, reason="a peer", fit=w.Fit.BEST)

        @w.hookimpl
        def load_weights(self, request):
            what = behave.get(request.rank, "serve")
            if isinstance(what, Exception):
                raise what
            return FromDict(wrong_tensors(), fail=what if what != "serve" else None)

    return Peer


def run(checkpoint, plugin, *, timeout=20.0, host=None):
    group = Group(SIZE)

    def rank_main(rank):
        with torch.device("meta"):
            model = nn.Linear(3, 2)
        engine = w.TorchEngine(
            model, topology=w.Topology.tensor_parallel(SIZE, rank), gather=group.gather(rank)
        )
        request = w.LoadRequest(checkpoint=checkpoint, engine=engine.info, timeout=timeout)
        chosen = host(rank) if host else host_of(peer=plugin)
        with chosen.session(request, engine) as session:
            session.resolve()
            session.load()
            session.apply()
            return session.finish(), model

    return group.run(rank_main)


def test_all_served_all_take_it(checkpoint):
    for future in run(checkpoint, peer({})):
        report, model = future.result()
        assert report.provider == "peer"
        assert torch.all(model.weight == 7)


@pytest.mark.parametrize("reason", [w.Declined("no peer"), w.LoadFailed("lost it", mutated=False)])
def test_one_rank_is_not_served_so_all_go_to_the_disk(checkpoint, reason):
    for future in run(checkpoint, peer({1: reason})):
        report, model = future.result()
        assert report.provider == "disk"
        assert not torch.any(model.weight == 7)
    served_here = run(checkpoint, peer({1: reason}))[0].result()[0]
    assert "another rank was not served" in served_here.attempts[0].reason


def test_one_rank_fails_while_applying_so_all_bring_their_engine_back(checkpoint):
    class Lazy:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.SOURCE}, reason="a peer", fit=w.Fit.BEST)

        @w.hookimpl
        def load_weights(self, request):
            fail = w.LoadFailed("died half-way", mutated=False) if request.rank == 1 else None
            return FromDict(wrong_tensors(), fail=fail)

    for future in run(checkpoint, Lazy):
        report, model = future.result()
        assert report.provider == "disk"
        assert not torch.any(model.weight == 7)


def test_an_error_on_one_rank_ends_the_load_on_all(checkpoint):
    first, second = run(checkpoint, peer({1: ValueError("bug")}))
    with pytest.raises(errors.RanksDisagreeError, match=r"rank 1 failed.*bug"):
        first.result()
    with pytest.raises(errors.PluginFailedError, match=r"bug.*rank 1"):
        second.result()


def test_ranks_with_different_plans_are_found_out(checkpoint):
    futures = run(checkpoint, None, host=lambda rank: host_of(**({"peer": peer({})} if rank == 0 else {})))
    for future in futures:
        with pytest.raises(errors.RanksDisagreeError, match="disk"):
            future.result()


def test_a_rank_that_never_answers_is_a_timeout_not_a_hang(checkpoint):
    def host(rank):
        if rank == 1:
            raise RuntimeError("this rank died before the load")
        return host_of()

    first, second = run(checkpoint, None, timeout=0.2, host=host)
    with pytest.raises(errors.RanksDisagreeError, match=r"rank 0, at resolve of 'disk', waited 0\.2 s"):
        first.result()
    with pytest.raises(RuntimeError, match="died"):
        second.result()


def test_a_gather_of_something_else_is_an_error(checkpoint):
    topology = w.Topology.tensor_parallel(2, 0)
    engine = w.TorchEngine(nn.Linear(3, 2), topology=topology, gather=lambda value, _: [value, "noise"])
    with pytest.raises(errors.RanksDisagreeError, match="noise"):
        w.load(engine, checkpoint, host=host_of())


def test_an_engine_that_cannot_come_back_on_one_rank_ends_the_load_on_all(checkpoint):
    group = Group(SIZE)

    def rank_main(rank):
        engine = w.TorchEngine(
            nn.Linear(3, 2),
            topology=w.Topology.tensor_parallel(SIZE, rank),
            gather=group.gather(rank),
            reinit=(lambda model: None) if rank == 0 else None,
        )
        failing = peer({0: w.LoadFailed("lost", mutated=False), 1: w.LoadFailed("lost", mutated=True)})
        engine._written_in_place = True
        return w.load(engine, checkpoint, host=host_of(peer=failing))

    first, second = group.run(rank_main)
    with pytest.raises(errors.RanksDisagreeError, match="reinit"):
        first.result()
    with pytest.raises(errors.EngineError, match="reinit"):
        second.result()


@pytest.mark.parametrize("mutated", [False, True])
def test_a_provider_whose_ranks_are_lost_is_not_waited_for_again(checkpoint, mutated):
    calls = []

    def never(value, timeout):
        calls.append(value)
        if len(calls) > 1:  # after `resolve`
            raise TimeoutError
        return [value] * SIZE

    class Agreeing:
        weights_api = 1

        @w.hookimpl
        def resolve_format(self):
            return w.FormatClaim(roles={w.Role.SOURCE}, reason="a peer", fit=w.Fit.BEST)

        @w.hookimpl
        def load_weights(self, request, engine):
            try:
                gather(engine, request, "mine", "agreeing")
            except errors.RanksDisagreeError as exc:
                exc.mutated = mutated
                raise

    engine = w.TorchEngine(
        nn.Linear(3, 2), topology=w.Topology.tensor_parallel(SIZE, 0), gather=never, reinit=lambda model: None
    )
    with pytest.raises(errors.RanksDisagreeError, match="rank 0, agreeing, waited 600 s") as caught:
        w.load(engine, checkpoint, host=host_of(peer=Agreeing))
    assert len(calls) == 2
    assert ("the engine was re-initialised" in caught.value.__notes__) == mutated
